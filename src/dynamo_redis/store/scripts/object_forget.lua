-- Drop names from the index of objects, unless a put has added them again meanwhile.
--
-- KEYS[1]  the index: a sorted set of object names by the time of their last put
-- ARGV     pairs of a name and the score that was read with it
-- Answers  the number of dropped names
-- Atomic:  a name whose score has changed stays.
local dropped = 0
for i = 1, #ARGV, 2 do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    dropped = dropped + redis.call('ZREM', KEYS[1], ARGV[i])
  end
end
return dropped
