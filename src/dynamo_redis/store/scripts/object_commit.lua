-- Make uploaded chunks the object's current version.
--
-- KEYS[1]           the pointer: a hash with the current version's manifest
-- KEYS[2 .. 1+n]    the new version's chunks
-- KEYS[2+n ..]      chunks of the version that is replaced, without those that the new one has, too
-- ARGV[1]           n
-- ARGV[2]           the version that the caller knows as current, '' for none
-- ARGV[3]           ms that replaced chunks stay, for those who read them
-- ARGV[4 ..]        fields and values of the new manifest
-- Answers           {'ok', created_at in ms}, {'missing', number of chunks gone},
--                   or {'changed'}: another version is current, the list of replaced chunks is not right
-- Atomic:           a reader sees the old manifest or the new one; every chunk of the new one is there, and
--                   none of them expires. A manifest that is current already, but for `version`, stays.
local current = redis.call('HMGET', KEYS[1], 'version', 'created_at_ms')
if (current[1] or '') ~= ARGV[2] then
  return {'changed'}
end

local count = tonumber(ARGV[1])
local gone = 0
for i = 2, 1 + count do
  gone = gone + 1 - redis.call('EXISTS', KEYS[i])
end
if gone > 0 then
  return {'missing', gone}
end

local same = current[1] and current[2] and string.match(current[2], '^%d+$')
for i = 4, #ARGV, 2 do
  same = same and (ARGV[i] == 'version' or redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1])
end
local created_at_ms = current[2]
if not same then
  local now = redis.call('TIME')
  created_at_ms = string.format('%d%03d', now[1], math.floor(now[2] / 1000))
  -- First, because it is the one write that a full server refuses: then nothing has happened.
  redis.call('HSET', KEYS[1], 'created_at_ms', created_at_ms, unpack(ARGV, 4))
end

for i = 2, 1 + count do
  redis.call('PERSIST', KEYS[i])
end
for i = 2 + count, #KEYS do
  redis.call('PEXPIRE', KEYS[i], ARGV[3])
end
return {'ok', created_at_ms}
