-- Keep a stream that is of use to a reader, and remove one that is not.
--
-- KEYS     see stream_prelude
-- ARGV[1]  ms of silence after which a group is removed
-- Answers  {'ok', 1 it has a group, or a snapshot from which it goes on}, {'ok', 0}: there is none now, or
--          {'schema', found}
-- Atomic:  a group that is made afterwards finds the stream as it is, or makes it.
local answer = open()
if answer then return answer end
if LENGTH then
  advance()
  -- Behind a snapshot that is before the floor something was trimmed: no reader can begin with it.
  if #remove_silent(ARGV[1]) > 0 or SNAPSHOT and not is_before(SNAPSHOT, FLOOR) then
    save()
    return {'ok', 1}
  end
end
redis.call('UNLINK', unpack(KEYS))
return {'ok', 0}
