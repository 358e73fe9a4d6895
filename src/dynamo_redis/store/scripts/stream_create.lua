-- Make a group at the stream's present end, and the stream.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- Answers  {'ok', the end}, or {'schema', found}
-- Atomic:  what is appended from now on is the group's to read. One of that name begins anew.
local answer = open()
if answer then return answer end
advance()
restore()
place(ARGV[1], LAST)
save()
return {'ok', LAST}
