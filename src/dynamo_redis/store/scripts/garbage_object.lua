-- Remove an object that no record names, unless it was put lately or is locked; its readers can finish.
--
-- KEYS[1]  the pointer
-- KEYS[2]  the object's lock
-- KEYS[3…] the chunks of the version that the caller takes for the current one
-- ARGV[1]  that version
-- ARGV[2]  ms for which the object must not have been put
-- ARGV[3]  ms that the chunks stay
-- Answers  1 removed, 0 left alone
-- Atomic:  the object exists with all its chunks, or not at all. A put that ends later makes it anew.
local found = redis.call('HMGET', KEYS[1], 'version', 'created_at_ms', 'put_at_ms')
if found[1] ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 1 then
  return 0
end
local time = redis.call('TIME')
local put_at = math.max(tonumber(found[2] or '') or 0, tonumber(found[3] or '') or 0)
if time[1] * 1000 + math.floor(time[2] / 1000) - put_at < tonumber(ARGV[2]) then
  return 0
end
local removed = redis.call('DEL', KEYS[1])
-- Ten milliseconds apart: a server that drops a thousand chunks at once serves no command meanwhile.
for i = 3, #KEYS do
  redis.call('PEXPIRE', KEYS[i], ARGV[3] + 10 * (i - 3))
end
return removed
