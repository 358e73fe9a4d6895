-- Put a group behind a position.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- ARGV[2]  position: an entry, or the floor
-- Answers  {'ok'}, {'trimmed', floor}: what follows the position is not all there, {'lost'}: the stream or the
--          group is gone, or {'schema', found}
-- Atomic:  a group that was put there reads all that follows, or is told by the chain of entries.
local answer = open()
if answer then return answer end
local group, position = ARGV[1], ARGV[2]

local found = redis.call('ZSCORE', GROUPS, group)
local placed = false
for _, other in ipairs(list_groups()) do
  placed = placed or other[1] == group
end
if not found or not placed then return {'lost'} end

-- An id that is none of these is of a stream that was here before, or the entry was deleted by hand.
local function is_known()
  if position == FLOOR or position == LAST then return true end
  return is_before(FLOOR, position) and #redis.call('XRANGE', EVENTS, position, position) == 1
end
if not is_known() then return {'trimmed', FLOOR} end

advance()
place(group, position)
save()
return {'ok'}
