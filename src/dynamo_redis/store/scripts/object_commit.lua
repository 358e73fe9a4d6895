-- Make uploaded chunks the object's current version.
--
-- KEYS[1]           the pointer: a hash with the current version's manifest
-- KEYS[2]           the object's lock
-- KEYS[3]           the mark of this commit, named after the new version: the time at which it took effect
-- KEYS[4 .. 3+n]    the new version's chunks
-- KEYS[4+n ..]      chunks of the replaced version, without those of the new one
-- ARGV[1]           n
-- ARGV[2]           the version that the caller takes for the current one, '' for none
-- ARGV[3]           ms that replaced chunks stay for their readers, and that the mark stays
-- ARGV[4], ARGV[5]  owner and fencing token of the lock of a fenced put; else '' and ''
-- ARGV[6 ..]        fields and values of the new manifest, 'version' first
-- Answers           {'ok', created_at in ms}, {'missing', number of missing chunks},
--                   {'lost'}: the lock has another owner or none, or a later holder has put the object,
--                   or {'changed'}: another version is current, so the list of replaced chunks is wrong
-- Atomic:           a reader sees the old manifest or the new one. Every chunk of the new one exists, and none
--                   expires. A manifest that is equal to the current one, except for `version`, is not
--                   written. A repetition after a lost answer changes nothing and answers as the first call
--                   did, also when the lock is gone, or the object was replaced or removed since.
local done_at_ms = redis.call('GET', KEYS[3])
local current = redis.call('HMGET', KEYS[1], 'version', 'created_at_ms', 'token')
if done_at_ms or current[1] == ARGV[7] then
  return {'ok', done_at_ms or current[2]}
end
if ARGV[4] ~= '' then
  local written_by = tonumber(current[3] or 0)
  if redis.call('HGET', KEYS[2], 'owner') ~= ARGV[4] or written_by > tonumber(ARGV[5]) then
    return {'lost'}
  end
end
if (current[1] or '') ~= ARGV[2] then
  return {'changed'}
end

local count = tonumber(ARGV[1])
local gone = count
for i = 4, 3 + count, 1000 do  -- Lua puts no more than some thousand values on its stack
  gone = gone - redis.call('EXISTS', unpack(KEYS, i, math.min(i + 999, 3 + count)))
end
if gone > 0 then
  return {'missing', gone}
end

local same = current[1] and current[2] and string.match(current[2], '^%d+$')
for i = 8, #ARGV, 2 do
  same = same and redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1]
end
local created_at_ms = current[2]
if not same then
  local now = redis.call('TIME')
  created_at_ms = string.format('%d%03d', now[1], math.floor(now[2] / 1000))
end
-- First, since it is the one write that a full server refuses: then nothing is changed.
redis.call('SET', KEYS[3], created_at_ms, 'PX', ARGV[3])
if not same then
  redis.call('HSET', KEYS[1], 'created_at_ms', created_at_ms, unpack(ARGV, 6))
end
-- `dynamo-redis gc` leaves an object alone that was put lately, also one that had the content already.
local put_at = redis.call('TIME')
redis.call('HSET', KEYS[1], 'put_at_ms', string.format('%d%03d', put_at[1], math.floor(put_at[2] / 1000)))
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'token', ARGV[5])
end

for i = 4, 3 + count do
  redis.call('PERSIST', KEYS[i])
end
-- Ten milliseconds apart: a server that drops a thousand chunks at once serves no command meanwhile.
for i = 4 + count, #KEYS do
  redis.call('PEXPIRE', KEYS[i], ARGV[3] + 10 * (i - 4 - count))
end
return {'ok', created_at_ms}
