-- Definitions of every script of an event stream.
--
-- KEYS  1 the stream of entries   2 meta, its head   3 groups: a zset, group → its last sign of life
--       4 sizes: a list, for each entry in order its number of events and its bytes, `events bytes`
--
-- Entries are appended without a script, which would copy their content several times: one transaction appends them
-- with their sizes and updates the sums in the head. Scripts drop entries, and keep all four structures consistent.
--
-- The head has `v`, the schema's version; `events` and `bytes`, the sums of all present entries; `floor`, the last
-- trimmed entry; `breaks`, the number of times that entries were missing that no script had dropped, or the head
-- itself. A reader has missed entries if the floor is after its position, or the number of breaks has changed.
-- `snapshot` is the position of the last snapshot to which the stream was trimmed.
--
-- A script drops or repairs MOST entries at most, so that it holds the server for milliseconds. Any script may answer
-- {'again'}: work is left, run it again. Then its main task may not have been done.
--
-- Signs of life count on a clock, which the head holds as `clock`, in ms, and `seen`, the TIME of the server when it
-- was saved. Only scripts of readers and trimmers advance it, by at most MAX_STEP_MS between two of them. So no group
-- becomes silent because a server was frozen or away, or because its clock stepped.

local EVENTS, META, GROUPS, SIZES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local MAJOR = '1'
local MAX_STEP_MS = 10000
local BEGINNING = '0-0'
local PAGE = 1000
local MOST = 4000

-- The head, filled by `open`, and the number of entries: nil if there is no stream.
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

-- The ids after and before an id. The last id of a millisecond is written `<ms>-` and LAST_NUMBER.
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

-- Return a flat answer of names and values as a table.
local function named(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

-- Return the last id that the stream has assigned.
local function find_end()
  return named(redis.call('XINFO', 'STREAM', EVENTS))['last-generated-id']
end

-- Return the position before all present entries.
local function find_floor()
  local first = redis.call('XRANGE', EVENTS, '-', '+', 'COUNT', 1)[1]
  return first and before(first[1]) or find_end()
end

-- Return the sums of the sizes from one index to another, both inclusive, counted from 0.
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

-- Remove the oldest `count` sizes, those of entries that have been dropped.
local function forget_sizes(count)
  if count == 0 then return end
  local events, bytes = sum_sizes(0, count - 1)
  EVENT_SUM, BYTE_SUM = math.max(0, EVENT_SUM - events), math.max(0, BYTE_SUM - bytes)
  redis.call('LTRIM', SIZES, count, -1)
end

-- Drop the oldest entries up to the id `last`, and their sizes: at most MOST entries and the rest of a node. Return
-- whether the entry `last` is dropped.
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

-- Make the structures consistent again after a change by hand. Return whether they are: MOST entries are repaired at a
-- time, and the head has `mending` until all are. The sums of a long stream whose head was lost are estimated.
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
  else -- the sizes of the oldest entries are missing, since later ones were appended with theirs
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

-- A full server refuses a command that may need memory only as a script's first write. Scripts that free memory, or
-- keep a reader alive that frees it, must not be refused. So they begin with this write, which needs no memory.
local function pass_when_full()
  redis.call('ZREM', GROUPS, '')
end

-- Read the head. Return an answer that ends the script, or nil. `only_reads`: write nothing unless the stream has to be
-- repaired.
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

-- Advance the clock; `save` stores it.
local function advance()
  local now = time_ms()
  if SEEN > 0 then CLOCK = CLOCK + math.max(0, math.min(now - SEEN, MAX_STEP_MS)) end
  SEEN = now
end

-- Return the server's groups, each with its name, its `position`, and its `lag`, the number of entries after that.
-- Entries that a group has read and not acknowledged are after its position. Servers before 7.0 do not count the
-- lag, later ones not always: then it is the number of all entries.
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

-- Put a group at a position (`$`: the end), without pending entries; return that position.
local function place(group, position)
  if LENGTH then redis.call('XGROUP', 'DESTROY', EVENTS, group) end
  redis.call('XGROUP', 'CREATE', EVENTS, group, position, 'MKSTREAM')
  redis.call('ZADD', GROUPS, string.format('%.0f', CLOCK), group)
  LENGTH = LENGTH or 0
  for _, other in ipairs(list_groups()) do
    if other.name == group then return other.position end
  end
end

-- Remove the groups that have been silent for longer than `limit_ms`. Return the remaining groups, and the names of the
-- removed ones.
local function remove_silent(limit_ms)
  local stay, removed, known = {}, {}, {}
  for _, group in ipairs(list_groups()) do
    known[group.name] = true
    -- A group that was made by hand has no sign of life yet: it counts from now on.
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
