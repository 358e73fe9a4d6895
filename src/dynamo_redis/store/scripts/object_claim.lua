-- Find out whether an upload has to send a chunk. A chunk that exists is kept for at least another ARGV[2].
--
-- KEYS[1]  the chunk
-- KEYS[2]  the claim on it: the upload that sends it; expires
-- KEYS[3]  the set of chunks that readers found damaged
-- ARGV[1]  its name in that set
-- ARGV[2]  ms that the chunk shall live; a chunk without an expiry gets none
-- ARGV[3]  its size in bytes
-- ARGV[4]  id of the calling upload
-- ARGV[5]  ms that a claim lives
-- Answers  0 absent: send it; 1 exists; 2 damaged: overwrite it; 3 another upload sends it
-- Atomic:  while a chunk is absent or damaged, one upload at a time gets the answer to send it.
local size = redis.call('STRLEN', KEYS[1])
local damaged = size > 0
  and (size ~= tonumber(ARGV[3]) or redis.call('SISMEMBER', KEYS[3], ARGV[1]) == 1)
if size > 0 and not damaged then
  local left = redis.call('PTTL', KEYS[1])
  if left >= 0 and left < tonumber(ARGV[2]) then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
  end
  return 1
end

local sender = redis.call('GET', KEYS[2])
if sender and sender ~= ARGV[4] then
  return 3
end
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[5])
return damaged and 2 or 0
