-- Keep a stream that a reader can use, and remove one that no reader can use.
--
-- KEYS     see stream_prelude
-- ARGV[1]  ms of silence after which a group is removed
-- Answers  {'ok', 1}: it has a group, or a snapshot from which a reader can continue, {'ok', 0}: there is no stream
--          now, or {'schema', found}
-- Atomic:  a group that is created afterwards finds the whole stream, or creates it.
local answer = open()
if answer then return answer end
if LENGTH then
  advance()
  -- With a snapshot before the floor, entries after it were trimmed: no reader can start from it.
  if #remove_silent(ARGV[1]) > 0 or SNAPSHOT and not is_before(SNAPSHOT, FLOOR) then
    save()
    return {'ok', 1}
  end
end
redis.call('UNLINK', unpack(KEYS))
return {'ok', 0}
