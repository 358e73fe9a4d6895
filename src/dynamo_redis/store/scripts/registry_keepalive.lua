-- Renew a lease.
--
-- Called more often than all others together, so it does without their prelude: it neither reaps nor looks
-- whether all structures are there. Ticks do. A lost `leases` is no lease here, a lost `lr` no last write.
--
-- KEYS    1 meta   2 leases   3 lr   4 the lease's TTL key
-- ARGV    1 incarnation   2 lease   3 TTL in ms
-- Answers {'ok', its owner's last write as 'revision operation previous' or '', leases, ms since the clock was kept,
--          1 if the server's memory is full}
--         {'wiped'}, {'incarnation', found}, as the prelude says; {'no-lease'}
-- Atomic: a lease that has ended, even unnoticed so far, is not revived. It passes on a server that is full.

local META, LEASES, LR, TTL_KEY = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known, lease, ttl_ms = ARGV[1], ARGV[2], ARGV[3]

local head = redis.call('HMGET', META, 'inc', 'clock', 'seen')
if not head[1] then return {'wiped'} end
if head[1] ~= known then return {'incarnation', head[1]} end
local clock, idle_ms, now = read_clock(head[2], head[3])
local deadline = redis.call('ZSCORE', LEASES, lease)
if not deadline or tonumber(deadline) <= clock then
  -- Readers go by the time that was kept: they are to find it ended, too.
  if deadline then write_when_full('HSET', META, 'clock', clock, 'seen', now) end
  return {'no-lease'}
end
write_when_full('ZADD', LEASES, clock + ttl_ms, lease)
-- Other scripts keep the clock, as long as some run.
if idle_ms >= LATE_MS / 2 then redis.call('HSET', META, 'clock', clock, 'seen', now) end
if redis.call('PEXPIRE', TTL_KEY, ttl_ms) == 0 then redis.call('SET', TTL_KEY, known, 'PX', ttl_ms) end
return {'ok', redis.call('HGET', LR, lease) or '', redis.call('ZCARD', LEASES) - 1, idle_ms, FULL}
