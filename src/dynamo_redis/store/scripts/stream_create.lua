-- Create a group at the stream's present end, and the stream if it does not exist.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- Answers  {'ok', the end, breaks}, or {'schema', found}
-- Atomic:  the group gets all entries appended from now on. An existing group of that name starts again.
local answer = open()
if answer then return answer end
advance()
local position = place(ARGV[1], '$')
save()
return {'ok', position, BREAKS}
