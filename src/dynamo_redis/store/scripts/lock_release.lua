-- Release a lock.
--
-- KEYS[1]  the lock
-- ARGV[1]  owner
-- Answers  1 released, 0 the owner does not hold it
-- Atomic:  another owner's lock is never released.
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
