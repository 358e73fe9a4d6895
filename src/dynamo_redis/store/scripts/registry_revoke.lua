-- End a lease and delete its keys.
--
-- KEYS    1-7 the registry's structures   8 the lease's TTL key
-- ARGV    1 incarnation or ''   2 operation id   3 lease
-- Answers {'ok', revision}; also if the lease had ended before.
-- Atomic: watchers see the deletes, marked as revoked, in one run of log entries.

local refused = open()
if refused then return refused end
if is_alive(ARGV[3]) then finish(ARGV[3], 'r') end
redis.call('DEL', KEYS[8])
return {'ok', REV}
