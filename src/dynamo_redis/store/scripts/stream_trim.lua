-- Remove silent groups; drop entries that neither the snapshot nor a group needs any more.
--
-- KEYS     see stream_prelude
-- ARGV[1]  the snapshot's position
-- ARGV[2]  ms of silence after which a group is removed
-- Answers  {'ok', floor, removed group, ...}, {'again', floor, removed group, ...}: entries are left to drop,
--          {'lost'}: there is no stream, or {'schema', found}
-- Atomic:  no entry after the snapshot, or after the position of a remaining group, is dropped. The floor and the
--          snapshot's position are recorded.
local answer = open()
if answer then return answer end
if not LENGTH then return {'lost'} end
advance()

local cut = ARGV[1]
local groups, removed = remove_silent(ARGV[2])
for _, group in ipairs(groups) do
  if is_before(group.position, cut) then cut = group.position end
end

redis.call('HSET', META, 'snapshot', ARGV[1])
local is_last = not is_before(FLOOR, cut) or drop_up_to(cut)
save()
return {is_last and 'ok' or 'again', FLOOR, unpack(removed)}
