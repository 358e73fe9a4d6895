-- Tell how a stream stands.
--
-- KEYS     see stream_prelude
-- Answers  {'ok', entries, events, bytes, last entry, floor, then for each group its name, its position, entries
--          behind that, ms of silence}, {'lost'}: there is none, or {'schema', found}
-- Atomic:  changes nothing that stands there, unless it has to be mended.
local answer = open(true)
if answer then return answer end
if not LENGTH then return {'lost'} end
advance()

local told = {'ok', LENGTH, EVENT_SUM, BYTE_SUM, find_end(), FLOOR}
for _, group in ipairs(list_groups()) do
  local seen = redis.call('ZSCORE', GROUPS, group.name) or CLOCK
  for _, part in ipairs({group.name, group.position, group.lag, math.max(0, CLOCK - seen)}) do
    told[#told + 1] = part
  end
end
return told
