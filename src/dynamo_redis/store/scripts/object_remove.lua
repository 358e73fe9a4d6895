-- Remove an object; its readers can finish.
--
-- KEYS[1]  the pointer
-- KEYS[2…] the chunks of the version that the caller takes for the current one
-- ARGV[1]  that version, '' if it has none
-- ARGV[2]  ms that the chunks stay
-- Answers  1 removed, 0 another version is current, or none
-- Atomic:  the object exists with all its chunks, or not at all.
if (redis.call('HGET', KEYS[1], 'version') or '') ~= ARGV[1] then
  return 0
end
local removed = redis.call('DEL', KEYS[1])
-- Ten milliseconds apart: a server that drops a thousand chunks at once serves no command meanwhile.
for i = 2, #KEYS do
  redis.call('PEXPIRE', KEYS[i], ARGV[2] + 10 * (i - 2))
end
return removed
