-- Take a lock that is free, or find that the caller has it: the answer to an earlier attempt was lost.
--
-- KEYS[1]   the lock: a hash, there while somebody has it
-- KEYS[2]   the last token granted
-- KEYS[3…]  hashes that the lock protects, each with the `token` that last wrote it
-- ARGV[1]   owner, random
-- ARGV[2]   TTL in ms
-- ARGV[3]   the owner's process, for people
-- Answers   {'ok', token}, or {'held', owner, token, process, ms left}
-- Atomic:   one owner at a time; a token is higher than all that were granted or written with before, and
--           than those that a failover made forget, as far as the server's clock knows.
local held = redis.call('HMGET', KEYS[1], 'owner', 'token', 'process', 'ttl_ms')
if held[1] == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {'ok', held[2]}
end
if held[1] then
  local left = redis.call('PTTL', KEYS[1])
  local ttl_ms = tonumber(held[4] or ARGV[2])
  -- A server's clock that was set back would keep a dead owner's lock until it has caught up.
  if left < 0 or left > ttl_ms then
    redis.call('PEXPIRE', KEYS[1], ttl_ms)
    left = ttl_ms
  end
  return {'held', held[1], held[2], held[3], left}
end

local time = redis.call('TIME')
local token = time[1] * 1000000 + time[2]
local last = {redis.call('GET', KEYS[2])}
for i = 3, #KEYS do
  last[#last + 1] = redis.call('HGET', KEYS[i], 'token')
end
for _, seen in ipairs(last) do
  token = math.max(token, (tonumber(seen or 0) or 0) + 1)
end
token = string.format('%.0f', token)
-- First, because it is the one write that a full server refuses: then nothing has happened.
redis.call('SET', KEYS[2], token)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token, 'process', ARGV[3], 'ttl_ms', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'ok', token}
