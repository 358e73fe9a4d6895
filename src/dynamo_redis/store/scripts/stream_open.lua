-- Prepare a stream. A publisher runs this once, before the first entry that it appends.
--
-- KEYS     see stream_prelude
-- Answers  {'ok'}, or {'schema', found}: a later release writes this stream
-- Atomic:  the head has a version from now on, by which a loss of the head is detected.
local answer = open()
if answer then return answer end
save()
return {'ok'}
