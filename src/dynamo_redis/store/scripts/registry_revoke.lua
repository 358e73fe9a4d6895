-- End a lease and delete its keys.
--
-- KEYS    1-7 the registry's structures   8 the lease's TTL key
-- ARGV    1 incarnation or ''   2 operation id   3 lease
-- Answers {'ok', revision}; also if the lease has ended before.
--         {'again'}: the lease has ended, but some of its keys still have to be deleted
-- Atomic: from the first call on no read shows any of the keys. It succeeds on a full server.

return run(function()
  local lease = ARGV[3]
  local alive, deadline = is_alive(lease)
  if alive then
    deadline = REVOKED
    redis.call('ZADD', LEASES, REVOKED, lease)
  end
  if deadline then
    local _, gone = finish(lease, cause(deadline), REAP_KEYS)
    if not gone then return {'again'} end
  end
  redis.call('DEL', KEYS[8])
  return {'ok', REV}
end, true)
