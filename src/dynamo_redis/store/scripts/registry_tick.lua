-- Let time pass: reap ended leases.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id
-- Answers {'ok', incarnation, revision, operation, live leases, leases that ended but are left for the next call,
--         ms since the clock was kept, 1 if the server's memory is full}
-- Atomic, and bounded by the prelude's REAP_LEASES and REAP_KEYS. It passes on a server that is full, as renewals do: both
-- pass or neither. It looks at each structure, so one that cannot be used fails all ticks.

return run(function()
  local live, overdue = count_leases()
  return {'ok', INC, REV, LAST_OP, live, overdue, IDLE_MS, FULL}
end, true, true)
