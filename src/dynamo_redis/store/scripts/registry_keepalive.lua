-- Renew a lease.
--
-- It is called more often than all other scripts together, so it does not use their prelude: it neither reaps nor
-- checks that all structures exist. Ticks do both. If `leases` is lost, there is no lease; if `lr` is lost, there is
-- no last write.
--
-- KEYS    1 meta   2 leases   3 lr   4 the lease's TTL key
-- ARGV    1 incarnation   2 lease   3 TTL in ms
-- Answers {'ok', last write of its owner as 'revision operation previous' or '', leases, ms since the clock was saved,
--          1 if the server's memory is full}
--         {'wiped'}, {'incarnation', found}, as in the prelude; {'no-lease'}
-- Atomic: a lease that has ended is not revived, even if no script has reaped it. It succeeds on a full server.

local META, LEASES, LR, TTL_KEY = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known, lease, ttl_ms = ARGV[1], ARGV[2], ARGV[3]

local head = redis.call('HMGET', META, 'inc', 'clock', 'seen')
if not head[1] then return {'wiped'} end
if head[1] ~= known then return {'incarnation', head[1]} end
local clock, idle_ms, now = read_clock(head[2], head[3])
local deadline = redis.call('ZSCORE', LEASES, lease)
if not deadline or tonumber(deadline) <= clock then
  -- Readers use the saved clock: save it, so that they find the lease ended, too.
  if deadline then write_when_full('HSET', META, 'clock', clock, 'seen', now) end
  return {'no-lease'}
end
write_when_full('ZADD', LEASES, clock + ttl_ms, lease)
-- Other scripts save the clock, as long as some run.
if idle_ms >= LATE_MS / 2 then redis.call('HSET', META, 'clock', clock, 'seen', now) end
if redis.call('PEXPIRE', TTL_KEY, ttl_ms) == 0 then redis.call('SET', TTL_KEY, known, 'PX', ttl_ms) end
return {'ok', redis.call('HGET', LR, lease) or '', redis.call('ZCARD', LEASES) - 1, idle_ms, FULL}
