-- Remove silent groups; drop what neither the snapshot nor a group needs any more.
--
-- KEYS     see stream_prelude
-- ARGV[1]  the snapshot's position
-- ARGV[2]  ms of silence after which a group is removed
-- Answers  {'ok', floor, removed group, ...}, {'lost'}: there is no stream, or {'schema', found}
-- Atomic:  no entry behind the snapshot, or behind the position of a group that stays, is dropped; and the floor
--          is recorded with it.
local answer = open()
if answer then return answer end
if not EXISTS then return {'lost'} end
pass_when_full()
advance()

local cut = is_before(ARGV[1], LAST) and ARGV[1] or LAST
local removed = {}
local known = {}
for _, group in ipairs(list_groups()) do
  local name, position = group[1], group[2]
  known[name] = true
  -- One that somebody made by hand is given the time of the others from now on.
  redis.call('ZADD', GROUPS, 'NX', string.format('%.0f', CLOCK), name)
  if CLOCK - redis.call('ZSCORE', GROUPS, name) > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DESTROY', EVENTS, name)
    redis.call('ZREM', GROUPS, name)
    removed[#removed + 1] = name
  elseif is_before(position, cut) then
    cut = position
  end
end
for _, name in ipairs(redis.call('ZRANGE', GROUPS, 0, -1)) do
  if not known[name] then redis.call('ZREM', GROUPS, name) end
end

redis.call('XTRIM', EVENTS, 'MINID', '=', behind(cut))
find_floor()
save()
return {'ok', FLOOR, unpack(removed)}
