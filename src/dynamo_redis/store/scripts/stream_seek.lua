-- Move a group to a position: it continues after it.
--
-- KEYS     see stream_prelude
-- ARGV[1]  group
-- ARGV[2]  position: an entry, or the floor
-- Answers  {'ok', breaks}, {'trimmed', floor}: entries after the position are missing, {'lost'}: the stream
--          or the group is gone, or {'schema', found}
-- Atomic:  all of it.
local answer = open()
if answer then return answer end
local group, position = ARGV[1], ARGV[2]

local placed = false
for _, other in ipairs(list_groups()) do
  placed = placed or other.name == group
end
if not placed or not redis.call('ZSCORE', GROUPS, group) then return {'lost'} end

-- Any other id is of an earlier stream under this name, or of an entry that was deleted by hand.
local function is_known()
  if position == FLOOR then return true end
  return is_before(FLOOR, position) and #redis.call('XRANGE', EVENTS, position, position) == 1
end

advance()
local known = is_known()
if known then place(group, position) end
save()
return known and {'ok', BREAKS} or {'trimmed', FLOOR}
