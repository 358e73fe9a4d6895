-- Give a temporary key the expiry that its writer did not get to set.
--
-- KEYS[1]  the key
-- ARGV[1]  ms that it stays; its owner, if it lives, renews it
-- Answers  1 it expires now, 0 it is gone or has an expiry
-- Atomic:  a key with an expiry keeps that.
if redis.call('PTTL', KEYS[1]) == -1 then
  return redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return 0
