-- Make a group at the stream's present end, and the stream.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- Answers  {'ok', the end, breaks}, or {'schema', found}
-- Atomic:  what is appended from now on is the group's to read. One of that name begins anew.
local answer = open()
if answer then return answer end
advance()
local position = place(ARGV[1], '$')
save()
return {'ok', position, BREAKS}
