-- Acquire a free lock. An owner that holds it already succeeds again: the answer to an earlier attempt was lost.
--
-- KEYS[1]   the lock: a hash, which exists while the lock is held
-- KEYS[2]   the last fencing token granted
-- KEYS[3…]  hashes that the lock protects, each with the `token` that last wrote it
-- ARGV[1]   random id of the owner
-- ARGV[2]   TTL in ms
-- ARGV[3]   the owner's process, for display
-- Answers   {'ok', token}, or {'held', owner, token, process, ms left}
-- Atomic:   one owner at a time. A token is higher than all tokens granted or written before. It is also higher
--           than tokens that a failover lost, unless the server's clock is behind.
local held = redis.call('HMGET', KEYS[1], 'owner', 'token', 'process', 'ttl_ms')
if held[1] == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {'ok', held[2]}
end
if held[1] then
  local left = redis.call('PTTL', KEYS[1])
  local ttl_ms = tonumber(held[4] or ARGV[2])
  -- After the server's clock was set back, the expiry would keep a dead owner's lock for longer than its TTL.
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
-- First, since it is the one write that a full server refuses: then nothing is changed.
redis.call('SET', KEYS[2], token)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token, 'process', ARGV[3], 'ttl_ms', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'ok', token}
