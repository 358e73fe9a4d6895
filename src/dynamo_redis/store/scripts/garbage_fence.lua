-- Forget the last fencing token of a lock that has long not been held and protects nothing.
--
-- KEYS[1]  the fence
-- KEYS[2]  the lock
-- KEYS[3…] what it protects: its value, and the object's pointer
-- ARGV[1]  ms for which the lock must not have been acquired
-- Answers  1 removed, 0 left alone
-- Atomic:  a later holder gets a higher token all the same, since tokens are times.
local token = tonumber(redis.call('GET', KEYS[1]) or '')
if not token then
  return 0
end
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    return 0
  end
end
local time = redis.call('TIME')
if time[1] * 1000000 + time[2] - token < ARGV[1] * 1000 then
  return 0
end
return redis.call('DEL', KEYS[1])
