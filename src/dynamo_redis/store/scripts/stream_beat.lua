-- Give a group's sign of life.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- Answers  {'ok', last entry}, {'lost'}: the stream or the group is gone, or {'schema', found}
-- Atomic.
local answer = open()
if answer then return answer end
if not EXISTS or not redis.call('ZSCORE', GROUPS, ARGV[1]) then return {'lost'} end
pass_when_full()
advance()
redis.call('ZADD', GROUPS, string.format('%.0f', CLOCK), ARGV[1])
save()
return {'ok', LAST}
