-- What every script of an event stream begins with.
--
-- KEYS  1 the stream of entries   2 meta, its head   3 groups: a zset, group -> its last sign of life
--
-- An entry has the fields `c` content, `p` id of the entry before, `t` totals of all entries before it: how many
-- they were, their events, their bytes. So what the stream holds is the totals in the head less those of its
-- first entry, and who reads an entry behind another than its `p` knows that some between them are gone, whoever
-- took them.
--
-- Signs of life are on a clock that stands in the head as `clock`, ms, and `seen`, what TIME said then. Time
-- passes on it only by scripts that readers and trimmers run, and by at most MAX_STEP_MS between two of them: a
-- server that was frozen or away, and a clock that stepped, silence no group.

local EVENTS, META, GROUPS = KEYS[1], KEYS[2], KEYS[3]
local MAJOR = '1'
local MAX_STEP_MS = 10000
local BEGINNING = '0-0'

-- The head, filled by `open`: last entry, totals with it; floor, the last entry that was trimmed, and totals
-- with that. EXISTS: whether there is a stream.
local LAST, TOTALS, FLOOR, TRIMMED, CLOCK, SEEN, EXISTS

local function parse_id(id)
  local ms, number = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(number)
end

local function is_before(one, other)
  local ms, number = parse_id(one)
  local other_ms, other_number = parse_id(other)
  return ms < other_ms or (ms == other_ms and number < other_number)
end

-- The ids next to an id. The last one of a millisecond is written `<ms>-` and LAST_NUMBER.
local LAST_NUMBER = '18446744073709551615'
local function behind(id)
  local ms, number = parse_id(id)
  if number >= 2 ^ 63 then return string.format('%.0f-0', ms + 1) end
  return string.format('%.0f-%.0f', ms, number + 1)
end
local function before(id)
  local ms, number = parse_id(id)
  if number > 0 then return string.format('%.0f-%.0f', ms, number - 1) end
  return ms > 0 and string.format('%.0f-', ms - 1) .. LAST_NUMBER or BEGINNING
end

local function parse_totals(text)
  local entries, events, bytes = string.match(text or '', '^(%d+) (%d+) (%d+)$')
  return {tonumber(entries) or 0, tonumber(events) or 0, tonumber(bytes) or 0}
end
local function format_totals(totals)
  return string.format('%.0f %.0f %.0f', totals[1], totals[2], totals[3])
end

-- An entry of an answer: its id, the id before it, the totals before it, its content; without the latter
-- three if somebody else has written it.
local function parse_entry(entry)
  local fields = {}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  return entry[1], fields.p, fields.t and parse_totals(fields.t), fields.c or ''
end

-- What stands before the first entry: everything up to there has been trimmed.
local function find_floor()
  local first = redis.call('XRANGE', EVENTS, '-', '+', 'COUNT', 1)[1]
  if not first then
    FLOOR, TRIMMED = LAST, TOTALS
    return
  end
  local id, previous, totals = parse_entry(first)
  FLOOR, TRIMMED = previous or before(id), totals or TRIMMED
end

-- A head for entries whose own is lost.
local function make_head()
  LAST, TOTALS, FLOOR, TRIMMED = BEGINNING, {0, 0, 0}, BEGINNING, {0, 0, 0}
  if not EXISTS then return end
  local last = redis.call('XREVRANGE', EVENTS, '+', '-', 'COUNT', 1)[1]
  if last then
    local id, _, totals, content = parse_entry(last)
    totals = totals or TOTALS
    LAST, TOTALS = id, {totals[1] + 1, totals[2], totals[3] + #content}
  end
  find_floor()
end

-- Read the head. Answers what the script is to answer at once, or nil.
local function open()
  local head = redis.call('HMGET', META, 'v', 'last', 'totals', 'floor', 'trimmed', 'clock', 'seen')
  if head[1] and string.match(head[1], '^%d+') ~= MAJOR then return {'schema', head[1]} end
  EXISTS = redis.call('EXISTS', EVENTS) == 1
  CLOCK, SEEN = tonumber(head[6] or 0), tonumber(head[7] or 0)
  LAST, TOTALS, FLOOR, TRIMMED = head[2], parse_totals(head[3]), head[4], parse_totals(head[5])
  if not LAST or not FLOOR then
    make_head()
  elseif not EXISTS then
    FLOOR, TRIMMED = LAST, TOTALS
  end
end

local function save()
  redis.call('HSET', META, 'v', MAJOR, 'last', LAST, 'totals', format_totals(TOTALS), 'floor', FLOOR,
    'trimmed', format_totals(TRIMMED), 'clock', string.format('%.0f', CLOCK), 'seen', string.format('%.0f', SEEN))
end

-- Let the stream be there; ids go on behind those of one that was deleted, also if the clock was set back.
local function restore()
  if EXISTS or LAST == BEGINNING then return end
  redis.call('XADD', EVENTS, LAST, 'c', '')
  redis.call('XTRIM', EVENTS, 'MAXLEN', '=', 0)
end

local function time_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Let time pass on the clock; `save` keeps it.
local function advance()
  local now = time_ms()
  if SEEN > 0 then CLOCK = CLOCK + math.max(0, math.min(now - SEEN, MAX_STEP_MS)) end
  SEEN = now
end

-- A server whose memory is full refuses a command that may take more only as a script's first write. Scripts
-- that give memory back, or keep alive what would, must not be refused: they begin with this one.
local function pass_when_full()
  redis.call('ZREM', GROUPS, '')
end

-- The groups as the server has them: {name, position}. What a group has read and not acknowledged is behind
-- its position.
local function list_groups()
  if not EXISTS then return {} end
  local found = {}
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', EVENTS)) do
    local group = {}
    for i = 1, #flat, 2 do group[flat[i]] = flat[i + 1] end
    local position = group['last-delivered-id']
    if tonumber(group.pending) > 0 then
      local first = redis.call('XPENDING', EVENTS, group.name)[2]
      local entry = first and redis.call('XRANGE', EVENTS, first, first)[1]
      local _, previous
      if entry then _, previous = parse_entry(entry) end
      if first then position = previous or before(first) end
    end
    found[#found + 1] = {group.name, position}
  end
  return found
end

-- Put a group at a position, with nothing pending.
local function place(group, position)
  if EXISTS then redis.call('XGROUP', 'DESTROY', EVENTS, group) end
  redis.call('XGROUP', 'CREATE', EVENTS, group, position, 'MKSTREAM')
  redis.call('ZADD', GROUPS, string.format('%.0f', CLOCK), group)
end
