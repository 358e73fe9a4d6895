-- Renew a lease.
--
-- KEYS    1-7 the registry's structures   8 the lease's TTL key
-- ARGV    1 incarnation or ''   2 operation id   3 lease   4 TTL in ms
-- Answers {'ok', its owner's last write as 'revision operation' or '', and as registry_tick: live leases,
--         ended leases left, ms since the script before}
--         {'no-lease'}
-- Atomic: a lease that has ended, even unnoticed so far, is not revived.

return run(function()
  local lease, ttl_ms = ARGV[3], tonumber(ARGV[4])
  if OVERDUE and not is_alive(lease) then return {'no-lease'} end
  -- 0 also if it was renewed within this very millisecond.
  if redis.call('ZADD', LEASES, 'XX', 'CH', CLOCK + ttl_ms, lease) == 0 and not is_alive(lease) then
    return {'no-lease'}
  end
  if redis.call('PEXPIRE', KEYS[8], ttl_ms) == 0 then redis.call('SET', KEYS[8], INC, 'PX', ttl_ms) end
  local live, overdue = count_leases()
  return {'ok', redis.call('HGET', LR, lease) or '', live, overdue, IDLE_MS}
end)
