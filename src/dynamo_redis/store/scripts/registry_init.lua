-- Create the registry if there is none, or if one of its structures is gone: then the others are deleted first.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 ''   2 operation id   3 a random incarnation, for a new registry   4 schema version
-- Answers {'ok', incarnation, revision, operation} or {'schema', found}.
-- Atomic: if many callers find the registry gone, the first creates it, and the others find it intact and write
--         nothing. `meta` is written last: without it there is no registry.

local answer = look(function() return {'ok', INC, REV, LAST_OP} end, true)
if answer[1] ~= 'wiped' then return answer end

redis.call('UNLINK', META, KV, IDX, LEASES, LK, LR, LOG)
local _, _, now = read_clock(0, 0)
INC, REV, LAST_OP = ARGV[3], '0-0', ''
emit('i', '', INC, '', '', 0)
redis.call('HSET', KV, '', INC)
redis.call('HSET', LR, '', INC)
redis.call('ZADD', IDX, 0, '\0' .. INC)
redis.call('ZADD', LK, 0, '\0' .. INC)
redis.call('ZADD', LEASES, '+inf', '\0' .. INC)
redis.call('HSET', META, 'schema', ARGV[4], 'inc', INC, 'clock', 0, 'seen', now, 'rev', REV, 'op', LAST_OP)
return {'ok', INC, REV, LAST_OP}
