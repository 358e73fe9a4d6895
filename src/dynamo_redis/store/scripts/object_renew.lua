-- Keep chunks alive: those being uploaded, or those of a replaced version that is still being read.
--
-- KEYS     chunks
-- ARGV[1]  ms that they shall live; chunks without an expiry (of the current version) get none
-- Answers  the number of chunks that are gone
-- Atomic:  though each chunk by itself would be enough.
local gone = 0
for i, chunk in ipairs(KEYS) do
  local left = redis.call('PTTL', chunk)
  if left == -2 then
    gone = gone + 1
  elseif left >= 0 and left < tonumber(ARGV[1]) then
    redis.call('PEXPIRE', chunk, ARGV[1] + 10 * i)  -- apart, so that they do not all end at once
  end
end
return gone
