-- Read the state of a stream.
--
-- KEYS     see stream_prelude
-- Answers  {'ok', entries, events, bytes, last entry, floor, then for each group its name, its position, entries
--          after that, ms of silence}, {'lost'}: there is no stream, or {'schema', found}
-- Atomic:  writes nothing, unless the stream has to be repaired.
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
