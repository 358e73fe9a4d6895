-- What a publisher runs once, before the first entry it appends.
--
-- KEYS     see stream_prelude
-- Answers  {'ok'}, or {'schema', found}: a later release writes this stream
-- Atomic:  the head has a version from now on, by which its loss would be noticed.
local answer = open()
if answer then return answer end
save()
return {'ok'}
