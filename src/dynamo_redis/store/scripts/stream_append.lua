-- Append entries.
--
-- KEYS     see stream_prelude
-- ARGV[1]  most events the stream keeps
-- ARGV[2]  most bytes of content it keeps
-- ARGV[3]  ms after which an entry is dropped, or ''
-- ARGV[4 ..]  for each entry how many events it has, and its content
-- Answers  {'ok', id of the last entry}, or {'schema', found}
-- Atomic:  all are appended, in order, with what they say of those before. A stream over its ceiling loses its
--          oldest sixteenth, again and again until it is not, whoever has not read it; the newest entry stays.
local answer = open()
if answer then return answer end

restore()
for i = 4, #ARGV, 2 do
  local content = ARGV[i + 1]
  LAST = redis.call('XADD', EVENTS, '*', 'p', LAST, 't', format_totals(TOTALS), 'c', content)
  TOTALS = {TOTALS[1] + 1, TOTALS[2] + ARGV[i], TOTALS[3] + #content}
end

if ARGV[3] ~= '' then
  local cutoff = string.format('%.0f', math.max(1, time_ms() - ARGV[3]))
  if redis.call('XTRIM', EVENTS, 'MINID', '=', cutoff) > 0 then find_floor() end
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[3] * 2) end
end

local most_events, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local function is_over()
  return TOTALS[2] - TRIMMED[2] > most_events or TOTALS[3] - TRIMMED[3] > most_bytes
end
if is_over() then find_floor() end  -- some may have been trimmed by hand
while is_over() do
  local length = redis.call('XLEN', EVENTS)
  if length < 2 then break end
  redis.call('XTRIM', EVENTS, 'MAXLEN', '=', length - math.ceil(length / 16))
  find_floor()
end

save()
return {'ok', LAST}
