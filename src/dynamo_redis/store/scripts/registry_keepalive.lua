-- Renew a lease.
--
-- KEYS    1-7 the registry's structures   8 the lease's TTL key
-- ARGV    1 incarnation or ''   2 operation id   3 lease   4 TTL in ms
-- Answers {'ok', its owner's last write as 'revision operation', or ''} or {'no-lease'}.
-- Atomic: a lease that has ended, even unnoticed so far, is not revived.

local refused = open()
if refused then return refused end
local lease, ttl_ms = ARGV[3], tonumber(ARGV[4])
if not is_alive(lease) then return {'no-lease'} end
redis.call('ZADD', LEASES, CLOCK + ttl_ms, lease)
redis.call('SET', KEYS[8], INC, 'PX', ttl_ms)
return {'ok', redis.call('HGET', LR, lease) or ''}
