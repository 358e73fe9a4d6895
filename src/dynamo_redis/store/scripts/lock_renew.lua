-- Renew a lock for another TTL.
--
-- KEYS[1]  the lock
-- ARGV[1]  owner
-- ARGV[2]  TTL in ms
-- Answers  1 renewed, 0 the owner does not hold it
-- Atomic:  another owner's lock is never renewed.
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then
  return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
