-- Replace the value that a lock protects.
--
-- KEYS[1]  the lock
-- KEYS[2]  the protected value: a hash
-- ARGV[1]  owner
-- ARGV[2]  its fencing token
-- ARGV[3]  number of this write in that holding, from 1
-- ARGV[4]  the value
-- Answers  1 written, now or by an earlier attempt; 0 the owner does not hold the lock
-- Atomic:  only the present owner writes, and never over a later token. A write that arrives twice, or after a
--          later write of the same holding, changes nothing.
local token, number = tonumber(ARGV[2]), tonumber(ARGV[3])
local stored = redis.call('HMGET', KEYS[2], 'token', 'number', 'owner')
local stored_token, stored_number = tonumber(stored[1] or 0), tonumber(stored[2] or 0)
-- Compared by owner: after a failover two holdings may have the same token.
if stored[3] == ARGV[1] and stored_number >= number then
  return 1
end
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] or stored_token > token then
  return 0
end
redis.call('HSET', KEYS[2], 'value', ARGV[4], 'token', ARGV[2], 'number', ARGV[3], 'owner', ARGV[1])
return 1
