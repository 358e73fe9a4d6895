-- Let time pass: reap ended leases.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id
-- Answers {'ok', incarnation, revision, operation, live leases, leases that ended but are left for the next call}
-- Atomic: a lease's keys go all at once.

local refused = open()
if refused then return refused end
local overdue = redis.call('ZCOUNT', LEASES, '-inf', CLOCK)
return {'ok', INC, REV, LAST_OP, redis.call('ZCARD', LEASES) - 1 - overdue, overdue}
