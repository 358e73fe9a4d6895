-- Make uploaded chunks the object's current version.
--
-- KEYS[1]           the pointer: a hash with the current version's manifest
-- KEYS[2]           the object's lock
-- KEYS[3]           the mark of this commit, named after the new version: it took effect, and when
-- KEYS[4 .. 3+n]    the new version's chunks
-- KEYS[4+n ..]      chunks of the version that is replaced, without those that the new one has, too
-- ARGV[1]           n
-- ARGV[2]           the version that the caller knows as current, '' for none
-- ARGV[3]           ms that replaced chunks stay, for those who read them, and the mark
-- ARGV[4], ARGV[5]  of a fenced put, the lock's owner and fencing token; else '' and ''
-- ARGV[6 ..]        fields and values of the new manifest, beginning with 'version' and it
-- Answers           {'ok', created_at in ms}, {'missing', number of chunks gone},
--                   {'lost'}: the lock is another's, or a later holder has put the object,
--                   or {'changed'}: another version is current, the list of replaced chunks is not right
-- Atomic:           a reader sees the old manifest or the new one; every chunk of the new one is there, and
--                   none of them expires. A manifest that is current already, but for `version`, stays.
--                   Repeated after its answer was lost, it changes nothing and answers as it did, also when
--                   the lock is gone, and when the object has been replaced or removed since.
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
-- First, because it is the one write that a full server refuses: then nothing has happened.
redis.call('SET', KEYS[3], created_at_ms, 'PX', ARGV[3])
if not same then
  redis.call('HSET', KEYS[1], 'created_at_ms', created_at_ms, unpack(ARGV, 6))
end
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'token', ARGV[5])
end

for i = 4, 3 + count do
  redis.call('PERSIST', KEYS[i])
end
-- Ten milliseconds apart: a server that drops a thousand chunks at once serves nobody meanwhile.
for i = 4 + count, #KEYS do
  redis.call('PEXPIRE', KEYS[i], ARGV[3] + 10 * (i - 4 - count))
end
return {'ok', created_at_ms}
