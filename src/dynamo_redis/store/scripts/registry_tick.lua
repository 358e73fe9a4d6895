-- Advance the service clock, and reap ended leases.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id
-- Answers {'ok', incarnation, revision, operation, live leases, ended leases left for the next call,
--         ms since the clock was saved, 1 if the server's memory is full}
-- Atomic: and bounded by REAP_LEASES and REAP_KEYS of the prelude. It succeeds on a full server, as renewals do, so
--         that neither works without the other. It uses each structure, so an unusable one fails all ticks.

return run(function()
  local live, overdue = count_leases()
  return {'ok', INC, REV, LAST_OP, live, overdue, IDLE_MS, FULL}
end, true, true)
