-- Record a group's sign of life, check that no entry was deleted by hand, and remove silent groups.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- ARGV[2]  ms of silence after which a group is removed
-- Answers  {'ok', floor, breaks}, {'lost'}: the stream or the group is gone, or {'schema', found}
-- Atomic:  all of it.
local answer = open()
if answer then return answer end
if not LENGTH or not redis.call('ZSCORE', GROUPS, ARGV[1]) then return {'lost'} end
advance()
redis.call('ZADD', GROUPS, string.format('%.0f', CLOCK), ARGV[1])
remove_silent(ARGV[2])
save()
return {'ok', FLOOR, BREAKS}
