-- Tell how a stream stands.
--
-- KEYS     see stream_prelude
-- Answers  {'ok', entries, events, bytes, last entry, floor, then for each group its name, its position, entries
--          behind that, ms of silence}, {'lost'}: there is none, or {'schema', found}
-- Atomic.  Changes nothing.
local answer = open()
if answer then return answer end
if not EXISTS then return {'lost'} end
advance()

-- How much follows a position: entries, events, bytes.
local function behind_position(position)
  local first = redis.call('XRANGE', EVENTS, behind(position), '+', 'COUNT', 1)[1]
  if not first then return {0, 0, 0} end
  local _, _, totals = parse_entry(first)
  totals = totals or TRIMMED
  return {TOTALS[1] - totals[1], TOTALS[2] - totals[2], TOTALS[3] - totals[3]}
end

local held = behind_position(BEGINNING)
local told = {'ok', redis.call('XLEN', EVENTS), held[2], held[3], LAST, FLOOR}
for _, group in ipairs(list_groups()) do
  local name, position = group[1], group[2]
  local seen = redis.call('ZSCORE', GROUPS, name) or CLOCK
  for _, part in ipairs({name, position, behind_position(position)[1], math.max(0, CLOCK - seen)}) do
    told[#told + 1] = part
  end
end
return told
