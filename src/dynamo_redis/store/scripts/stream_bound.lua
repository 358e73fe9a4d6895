-- Hold a stream under its ceiling.
--
-- KEYS     see stream_prelude
-- ARGV[1]  most events the stream keeps
-- ARGV[2]  most bytes of content it keeps
-- ARGV[3]  ms after which an entry is dropped, or ''
-- Answers  {'ok', floor}, {'again', floor}: entries are left to drop, or {'schema', found}
-- Atomic:  the oldest entries are dropped, also unread ones, until the stream is a sixteenth below its ceiling or MOST
--          entries are dropped, so that this is not done at each entry. The newest entry stays. The floor is recorded.
--          A stream with a maximum age expires with its last entry.
local answer = open()
if answer then return answer end
if not LENGTH then return {'ok', FLOOR} end

local is_last = true
if ARGV[3] ~= '' then
  local newest = before(string.format('%.0f-0', math.max(1, time_ms() - ARGV[3])))
  -- Check the oldest entry first: if none is too old, the search for the last such entry would read them all.
  local oldest = redis.call('XRANGE', EVENTS, '-', newest, 'COUNT', 1)[1]
  if oldest then is_last = drop_up_to(redis.call('XREVRANGE', EVENTS, newest, '-', 'COUNT', 1)[1][1]) end
end

local most_events, most_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
if EVENT_SUM > most_events or BYTE_SUM > most_bytes then
  local drop = 0
  local events, bytes = EVENT_SUM, BYTE_SUM
  local function is_over() return events > most_events * 15 / 16 or bytes > most_bytes * 15 / 16 end
  while is_over() and drop < math.min(LENGTH - 1, MOST) do
    for _, size in ipairs(redis.call('LRANGE', SIZES, drop, math.min(drop + PAGE, LENGTH - 1) - 1)) do
      local of_entry, bytes_of_entry = string.match(size, '^(%d+) (%d+)$')
      events, bytes, drop = events - (of_entry or 0), bytes - (bytes_of_entry or 0), drop + 1
      if not is_over() then break end
    end
  end
  if drop > 0 then
    -- Drop all but the last of them, to read its id for the floor; then drop that one, too.
    redis.call('XTRIM', EVENTS, 'MAXLEN', '=', LENGTH - drop + 1)
    FLOOR = redis.call('XRANGE', EVENTS, '-', '+', 'COUNT', 1)[1][1]
    redis.call('XTRIM', EVENTS, 'MAXLEN', '=', LENGTH - drop)
    redis.call('LTRIM', SIZES, drop, -1)
    EVENT_SUM, BYTE_SUM = math.max(0, events), math.max(0, bytes)
    LENGTH = LENGTH - drop
  end
  is_last = is_last and (LENGTH <= 1 or not (EVENT_SUM > most_events or BYTE_SUM > most_bytes))
end
save()
if ARGV[3] ~= '' then
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, 2 * ARGV[3]) end
end
return {is_last and 'ok' or 'again', FLOOR}
