-- Let chunks expire that the current version of their object does not have.
--
-- KEYS[1]  the pointer
-- KEYS[2…] chunks without an expiry
-- ARGV[1]  ms that they stay: uploads that count on a chunk renew it meanwhile
-- ARGV[2…] the digest in the name of each chunk
-- Answers  the number of chunks that expire now
-- Atomic:  no chunk of the current version gets an expiry.
local current = redis.call('HGET', KEYS[1], 'chunks') or ''
local count = 0
for i = 2, #KEYS do
  if redis.call('PTTL', KEYS[i]) == -1 and not string.find(current, ARGV[i], 1, true) then
    count = count + redis.call('PEXPIRE', KEYS[i], ARGV[1])
  end
end
return count
