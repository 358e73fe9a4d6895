-- Give a group's sign of life, and look whether all that was appended is there.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- Answers  {'ok', floor, breaks}, {'lost'}: the stream or the group is gone, or {'schema', found}
-- Atomic.
local answer = open()
if answer then return answer end
if not LENGTH or not redis.call('ZSCORE', GROUPS, ARGV[1]) then return {'lost'} end
advance()
redis.call('ZADD', GROUPS, string.format('%.0f', CLOCK), ARGV[1])
save()
return {'ok', FLOOR, BREAKS}
