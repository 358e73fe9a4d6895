-- What every script of an event stream begins with.
--
-- KEYS  1 the stream of entries   2 meta, its head   3 groups: a zset, group -> its last sign of life
--       4 sizes: a list, for each entry in order its number of events and its bytes, `events bytes`
--
-- Entries are appended without a script, which would copy their content several times: in one transaction with
-- their sizes, and with the sums in the head. Scripts drop them, and keep all four in step.
--
-- The head has `v` the schema's version, `events` and `bytes` of all entries that are there, `floor` the last
-- entry that was trimmed, and `breaks`: how often entries were found to be gone that no script has dropped, or
-- the head itself. A reader that finds the floor ahead of itself, or another number of breaks, has missed some.
-- `snapshot` is the position of the last one to which it was trimmed.
--
-- A script drops or mends MOST entries at most, so that it holds the server for milliseconds. Any may answer
-- {'again'}: more is left, run it again. Nothing else that it is for may have been done.
--
-- Signs of life are on a clock that stands in the head as `clock`, ms, and `seen`, what TIME said then. Time
-- passes on it only by scripts that readers and trimmers run, and by at most MAX_STEP_MS between two of them: a
-- server that was frozen or away, and a clock that stepped, silence no group.

local EVENTS, META, GROUPS, SIZES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local MAJOR = '1'
local MAX_STEP_MS = 10000
local BEGINNING = '0-0'
local PAGE = 1000
local MOST = 4000

-- The head, filled by `open`, and how many entries there are: nil if there is no stream.
local EVENT_SUM, BYTE_SUM, FLOOR, BREAKS, CLOCK, SEEN, SNAPSHOT, LENGTH

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

-- A flat answer of names and values, as a table.
local function named(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

-- The last id that the stream has given.
local function find_end()
  return named(redis.call('XINFO', 'STREAM', EVENTS))['last-generated-id']
end

-- What stands before all entries that are there.
local function find_floor()
  local first = redis.call('XRANGE', EVENTS, '-', '+', 'COUNT', 1)[1]
  return first and before(first[1]) or find_end()
end

-- Sums of the sizes from one place to another, both inclusive, from 0.
local function sum_sizes(from, to)
  local events, bytes = 0, 0
  for start = from, to, PAGE do
    local page_end = math.min(start + PAGE - 1, to)
    for _, size in ipairs(redis.call('LRANGE', SIZES, start, page_end)) do
      local of_entry, bytes_of_entry = string.match(size, '^(%d+) (%d+)$')
      events, bytes = events + (of_entry or 0), bytes + (bytes_of_entry or 0)
    end
  end
  return events, bytes
end

-- Take so many of the oldest sizes away: those of entries that have been dropped.
local function forget_sizes(count)
  if count == 0 then return end
  local events, bytes = sum_sizes(0, count - 1)
  EVENT_SUM, BYTE_SUM = math.max(0, EVENT_SUM - events), math.max(0, BYTE_SUM - bytes)
  redis.call('LTRIM', SIZES, count, -1)
end

-- Drop the oldest entries up to an id, and their sizes: MOST of them, and then the rest of a node. `last` is the
-- newest that is to go. Answers whether it went.
local function drop_up_to(last)
  local dropped = redis.call('XTRIM', EVENTS, 'MINID', '~', behind(last), 'LIMIT', MOST)
  local is_last = dropped < MOST / 2
  if is_last then dropped = dropped + redis.call('XTRIM', EVENTS, 'MINID', '=', behind(last)) end
  if dropped > 0 then
    forget_sizes(dropped)
    if dropped == LENGTH then FLOOR = find_end() else FLOOR = is_last and last or find_floor() end
    LENGTH = LENGTH - dropped
  end
  return is_last
end

local function save()
  redis.call('HSET', META, 'v', MAJOR, 'events', string.format('%.0f', EVENT_SUM), 'bytes',
    string.format('%.0f', BYTE_SUM), 'floor', FLOOR, 'breaks', string.format('%.0f', BREAKS), 'clock',
    string.format('%.0f', CLOCK), 'seen', string.format('%.0f', SEEN))
end

-- Make all agree again, if somebody has changed by hand what only scripts drop. Answers whether they do: MOST
-- entries are mended at a time, and `mending` stands in the head until all are. Of a long stream whose head was
-- lost the sums are estimated.
local function mend(has_version, is_mending)
  local sized = redis.call('LLEN', SIZES)
  if not LENGTH then
    if sized == 0 and EVENT_SUM == 0 and BYTE_SUM == 0 and FLOOR == BEGINNING then return true end
    redis.call('UNLINK', SIZES)
    EVENT_SUM, BYTE_SUM, FLOOR, BREAKS = 0, 0, BEGINNING, BREAKS + 1
    save()
    return true
  end
  if LENGTH == sized and (has_version or LENGTH == 0) and not is_mending then return true end
  if not is_mending then BREAKS = BREAKS + 1 end
  local missing = LENGTH - sized
  if missing < 0 then
    forget_sizes(math.min(-missing, MOST))
  else -- of the oldest, since those that were appended afterwards have theirs
    local mean = string.format('%.0f %.0f', math.floor(EVENT_SUM / LENGTH), math.floor(BYTE_SUM / LENGTH))
    local means = {}
    for i = 1, math.min(missing, PAGE) do means[i] = mean end
    for start = 1, math.min(missing, MOST), PAGE do
      redis.call('LPUSH', SIZES, unpack(means, 1, math.min(PAGE, missing - start + 1)))
    end
  end
  local is_done = math.abs(missing) <= MOST
  if is_done and (LENGTH <= MOST or not has_version) then
    local events, bytes = sum_sizes(-math.min(LENGTH, MOST), -1)
    local scale = LENGTH / math.max(1, math.min(LENGTH, MOST))
    EVENT_SUM, BYTE_SUM = math.floor(events * scale), math.floor(bytes * scale)
  end
  FLOOR = find_floor()
  save()
  if is_done then redis.call('HDEL', META, 'mending') else redis.call('HSET', META, 'mending', '1') end
  return is_done
end

-- A server whose memory is full refuses a command that may take more only as a script's first write. Scripts
-- that give memory back, or keep alive what would, must not be refused: they begin with this one.
local function pass_when_full()
  redis.call('ZREM', GROUPS, '')
end

-- Read the head. Answers what the script is to answer at once, or nil. `only_reads`: it writes nothing unless
-- something has to be mended.
local function open(only_reads)
  local head = redis.call('HMGET', META, 'v', 'events', 'bytes', 'floor', 'breaks', 'clock', 'seen', 'snapshot', 'mending')
  if head[1] and string.match(head[1], '^%d+') ~= MAJOR then return {'schema', head[1]} end
  EVENT_SUM, BYTE_SUM = tonumber(head[2] or 0), tonumber(head[3] or 0)
  FLOOR, BREAKS = head[4] or BEGINNING, tonumber(head[5] or 0)
  CLOCK, SEEN, SNAPSHOT = tonumber(head[6] or 0), tonumber(head[7] or 0), head[8]
  LENGTH = redis.call('EXISTS', EVENTS) == 1 and redis.call('XLEN', EVENTS) or nil
  if not only_reads then pass_when_full() end
  if not mend(head[1], head[9]) then return {'again'} end
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

-- The groups as the server has them: name, `position`, and `lag`, how many entries follow that. What a group has
-- read and not acknowledged is behind its position. Servers before 7.0 count nothing, later ones not always:
-- then as many may follow as there are.
local function list_groups()
  if not LENGTH then return {} end
  local found = {}
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', EVENTS)) do
    local group = named(flat)
    local pending = tonumber(group.pending)
    group.position = group['last-delivered-id']
    group.lag = math.min(LENGTH, pending + (tonumber(group.lag) or LENGTH))
    if pending > 0 then
      local first = redis.call('XPENDING', EVENTS, group.name)[2]
      if first then group.position = before(first) end
    end
    found[#found + 1] = group
  end
  return found
end

-- Put a group at a position (`$`: the end), with nothing pending; answers where that is.
local function place(group, position)
  if LENGTH then redis.call('XGROUP', 'DESTROY', EVENTS, group) end
  redis.call('XGROUP', 'CREATE', EVENTS, group, position, 'MKSTREAM')
  redis.call('ZADD', GROUPS, string.format('%.0f', CLOCK), group)
  LENGTH = LENGTH or 0
  for _, other in ipairs(list_groups()) do
    if other.name == group then return other.position end
  end
end

-- Remove the groups that have been silent for longer than `limit_ms`; answers those that stay, and the names of
-- the others.
local function remove_silent(limit_ms)
  local stay, removed, known = {}, {}, {}
  for _, group in ipairs(list_groups()) do
    known[group.name] = true
    -- One that somebody made by hand is given the time of the others from now on.
    redis.call('ZADD', GROUPS, 'NX', string.format('%.0f', CLOCK), group.name)
    if CLOCK - redis.call('ZSCORE', GROUPS, group.name) > tonumber(limit_ms) then
      redis.call('XGROUP', 'DESTROY', EVENTS, group.name)
      redis.call('ZREM', GROUPS, group.name)
      removed[#removed + 1] = group.name
    else
      stay[#stay + 1] = group
    end
  end
  for _, name in ipairs(redis.call('ZRANGE', GROUPS, 0, -1)) do
    if not known[name] then redis.call('ZREM', GROUPS, name) end
  end
  return stay, removed
end
