-- Is a chunk there and intact? If so it is kept for at least another ARGV[1].
--
-- KEYS[1]  the chunk
-- ARGV[1]  ms that it shall live; a chunk without an expiry keeps none
-- ARGV[2]  SHA-1 of the right content, hex (the one hash that a script can compute; it only tells whether the
--          upload can be saved, what readers trust is SHA-256)
-- Answers  0 absent, 1 intact, 2 damaged
-- Atomic:  a chunk found intact cannot expire before ARGV[1] has passed.
local content = redis.call('GET', KEYS[1])
if not content then
  return 0
end
if redis.sha1hex(content) ~= ARGV[2] then
  return 2
end
local left = redis.call('PTTL', KEYS[1])
if left >= 0 and left < tonumber(ARGV[1]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return 1
