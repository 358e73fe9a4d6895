-- Definitions of every registry script except registry_keepalive; they follow those of registry_clock.
--
-- KEYS  1 meta  2 kv  3 idx  4 leases  5 lk  6 lr  7 log   (8 a lease's TTL key, in some scripts)
-- ARGV  1 the incarnation that the caller knows, '' for any   2 operation id of this call
--
-- A script that writes is `return run(function() … end)`, a script that only reads `return look(…)`. Instead of the
-- function's answer, either may answer:
--   {'schema', found}        an incompatible release wrote the registry; nothing was changed
--   {'wiped'}                there is no registry, or one of its structures is gone: run registry_init
--   {'incarnation', found}   it is not the registry that the caller knows
-- Otherwise `run` has advanced the service clock and reaped some ended leases: of up to REAP_LEASES leases, up to
-- REAP_KEYS keys. Keys of ended leases that are left are not shown. `look` writes nothing, so it works while the
-- server refuses writes, and uses the clock as last saved.
--
-- All effects of a script are atomic. Each uses only the seven structures of one hash tag, and a TTL key. Changes
-- are logged first and then applied. If an error stops a script in its middle, the rest of its changes is in the
-- log. The next script that writes applies them, and readers add them to the records that they read.

local META, KV, IDX, LEASES, LK, LR, LOG = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local KNOWN, OPERATION = ARGV[1], ARGV[2]
local MAJOR = '1'
local REAP_LEASES = 64
local REAP_KEYS = 256
local RECORDS = 4
local COPIED_BYTES = 2097152
local LOG_FLOOR = 10000
local MOST_BEHIND = 2000
local REVOKED = -1

-- The registry's head, filled by `open`: incarnation, last log id, its operation, service clock in ms, and the ms
-- since the clock was saved.
local INC, REV, LAST_OP, CLOCK, IDLE_MS

-- True if ended leases may be left. If not, every lease in LEASES is alive, and so is the lease of every key.
local OVERDUE = false

-- Changes that are logged and not yet applied, in order; and by key the record after the last of them, or false.
local pending, outcome = {}, {}

-- Number of entries that the log keeps.
local keep = nil

-- Unpack a record into a table. A value that no script wrote counts as a record without revision, lease and value: a
-- comparison with "absent" holds for it, any write replaces it, and readers report it as damaged.
local function read_record(packed)
  local whole, record = pcall(cmsgpack.unpack, packed)
  if whole and type(record) == 'table' and type(record[1]) == 'string' and type(record[2]) == 'string'
    and type(record[3]) == 'number' and type(record[4]) == 'string' and type(record[5]) == 'string' then
    return record
  end
  return {'', '', 0, '', ''}
end

-- Return whether each structure has the mark of the incarnation in `meta`: the loss of any of them is a wipe. The mark
-- of the log is the entry that `meta` names, unless the log was trimmed empty.
local function is_marked()
  if redis.call('HGET', KV, '') ~= INC or redis.call('HGET', LR, '') ~= INC then return false end
  for _, key in ipairs({IDX, LEASES, LK}) do
    if not redis.call('ZSCORE', key, '\0' .. INC) then return false end
  end
  return redis.call('XLEN', LOG) == 0 or #redis.call('XRANGE', LOG, REV, REV) == 1
end

-- Add a change of one key, with log entry `id`, to the pending ones. kind: p put, d deleted, r revoked, x expired.
-- `before` is the lease of the key before the change.
local function plan(id, kind, key, value, lease, create, version, before)
  if create == '' then create = id end
  local record = kind == 'p' and {id, create, tonumber(version), lease, value}
  pending[#pending + 1] = {kind, key, lease, before, record}
  outcome[key] = record
end

-- Apply the pending changes. The record is written last: if it is right, everything before it is.
local function settle()
  if #pending == 0 then return end
  for _, change in ipairs(pending) do
    local kind, key, lease, before, record = unpack(change, 1, 5)
    if before ~= '' and (before ~= lease or not record) then redis.call('ZREM', LK, before .. '\0' .. key) end
    if not record and lease ~= '' and lease ~= before then redis.call('ZREM', LK, lease .. '\0' .. key) end
    if record then
      redis.call('ZADD', IDX, 0, key)
      if lease ~= '' then redis.call('ZADD', LK, 0, lease .. '\0' .. key) end
      redis.call('HSET', KV, key, cmsgpack.pack(record))
    else
      redis.call('ZREM', IDX, key)
      redis.call('HDEL', KV, key)
    end
  end
  redis.call('HSET', META, 'rev', REV, 'op', LAST_OP)
  pending, outcome = {}, {}
end

-- Add the log entries after the entry that `meta` names to the pending changes: a script stopped before it applied
-- them. Return the ids of entries that no script wrote.
local function recall()
  local foreign = {}
  local entries = redis.call('XRANGE', LOG, '(' .. REV, '+', 'COUNT', MOST_BEHIND)
  for _, entry in ipairs(entries) do
    local id, kind, key, value, lease, create, version, operation, before, its =
      entry[1], entry[2][2], entry[2][4], entry[2][6], entry[2][8], entry[2][10], entry[2][12], entry[2][14],
      entry[2][16], entry[2][18]
    if before == REV and its == LAST_OP and (kind == 'p' or kind == 'd' or kind == 'r' or kind == 'x') then
      local packed = redis.call('HGET', KV, key)
      plan(id, kind, key, value, lease, create, version, packed and read_record(packed)[4] or '')
      REV, LAST_OP = id, operation
    else
      foreign[#foreign + 1] = id
    end
  end
  return foreign
end

-- Append to the change log; return the entry's id, which is the revision of the change. kind: as in `plan`, or i for a
-- new incarnation (in v).
local function emit(kind, key, value, lease, create, version)
  keep = keep or math.max(LOG_FLOOR, 4 * redis.call('ZCARD', IDX))
  local id = redis.call('XADD', LOG, 'MAXLEN', '~', keep, '*', 'o', kind, 'k', key, 'v', value, 'l', lease,
    'c', create, 'n', version, 'w', OPERATION, 'p', REV, 'q', LAST_OP)
  REV, LAST_OP = id, OPERATION
  return id
end

local function remove(key, kind, lease)
  plan(emit(kind, key, '', lease, '', 0), kind, key, '', lease, '', 0, lease)
end

-- Return the kind of the end of a lease. Its deadline is REVOKED while the keys of a revoked lease are deleted.
local function cause(deadline)
  return tonumber(deadline) == REVOKED and 'r' or 'x'
end

-- Delete up to `most` keys of an ended lease, logging each, and the lease itself if no keys are left. Return the number
-- of keys that were checked, and whether the lease is gone.
local function finish(lease, kind, most)
  local members = redis.call('ZRANGEBYLEX', LK, '[' .. lease .. '\0', '(' .. lease .. '\1', 'LIMIT', 0, most)
  local seen, copied = 0, 0
  while seen < #members and copied < COPIED_BYTES do
    local keys, last = {}, math.min(seen + RECORDS, #members)
    for index = seen + 1, last do keys[#keys + 1] = string.sub(members[index], #lease + 2) end
    for index, packed in ipairs(redis.call('HMGET', KV, unpack(keys))) do
      copied = copied + (packed and #packed or 0)
      local record = packed and read_record(packed)
      if record and (record[4] == lease or record[1] == '') then
        remove(keys[index], kind, lease)
      else -- the name has no record, or the key has another lease now
        redis.call('ZREM', LK, lease .. '\0' .. keys[index])
      end
    end
    seen = last
  end
  settle()
  if seen < #members or seen == most then return seen, false end
  redis.call('ZREM', LEASES, lease)
  redis.call('HDEL', LR, lease)
  return seen, true
end

-- Return whether a lease is alive, and its deadline; nil for an unknown lease.
local function is_alive(lease)
  local deadline = redis.call('ZSCORE', LEASES, lease)
  if not deadline then return false, nil end
  return tonumber(deadline) > CLOCK, deadline
end

-- Return the live record of a key, {mod_revision, create_revision, version, lease or '', value}, and its packed form;
-- nil if there is none. The third value is a record that is left of an ended lease.
local function current(key)
  local record, packed = outcome[key], nil
  if record == nil then
    packed = redis.call('HGET', KV, key)
    record = packed and read_record(packed)
  end
  if not record then return nil end
  if OVERDUE and record[4] ~= '' and not is_alive(record[4]) then return nil, nil, record end
  return record, packed or cmsgpack.pack(record)
end

-- Return the number of live leases, and of ended ones left for the next call.
local function count_leases()
  local overdue = OVERDUE and redis.call('ZCOUNT', LEASES, '-inf', CLOCK) or 0
  return redis.call('ZCARD', LEASES) - 1 - overdue, overdue
end

local function reap(ended)
  local left = REAP_KEYS
  for index = 1, #ended, 2 do
    local deleted, gone = finish(ended[index], cause(ended[index + 1]), left)
    left = left - deleted
    OVERDUE = not gone or left == 0
    if OVERDUE then return end
  end
  OVERDUE = #ended == 2 * REAP_LEASES
end

-- Read the head. Return an answer that ends the script, or nil and the TIME at which the clock was saved.
local function read_head()
  local meta = redis.call('HMGET', META, 'schema', 'inc', 'rev', 'op', 'clock', 'seen')
  if meta[1] and meta[1] ~= MAJOR and string.match(meta[1], '^%d+') ~= MAJOR then return {'schema', meta[1]} end
  INC, REV, LAST_OP, CLOCK = meta[2], meta[3], meta[4], meta[5]
  if not INC or redis.call('EXISTS', KV, IDX, LEASES, LK, LR, LOG) ~= 6 then return {'wiped'} end
  return nil, meta[6]
end

local function keep_clock(now)
  write_when_full('HSET', META, 'clock', CLOCK, 'seen', now)
end

-- Fill the head, advance the clock, apply pending changes and reap. Return an answer that ends the script, or nil. The
-- first script of each second, and a `thorough` one, checks the marks of the structures; every script checks that
-- the structures exist. `passes`: succeed also on a full server.
local function open(passes, thorough)
  local refused, seen = read_head()
  if refused then return refused end
  local now
  CLOCK, IDLE_MS, now = read_clock(CLOCK, seen)
  local new_second = math.floor(now / 1000) ~= math.floor(seen / 1000)
  if (new_second or thorough) and not is_marked() then return {'wiped'} end
  if KNOWN ~= '' and KNOWN ~= INC then return {'incarnation', INC} end
  local ended = redis.call('ZRANGEBYSCORE', LEASES, '-inf', CLOCK, 'WITHSCORES', 'LIMIT', 0, REAP_LEASES)
  -- Save a time at which a lease has ended, so that a clock that steps back does not revive it.
  local is_due = new_second or #ended > 0 or IDLE_MS >= KEEP_CLOCK_MS
  if passes then
    write_when_full('HSET', META, 'clock', CLOCK, 'seen', now)
  elseif is_due then
    redis.call('HSET', META, 'clock', CLOCK, 'seen', now)
  end
  for _, id in ipairs(recall()) do redis.call('XDEL', LOG, id) end
  settle()
  if #ended > 0 then reap(ended) end
end

-- Run a script that writes. `passes`: succeed also on a full server, since it needs no lasting memory. `thorough`:
-- check the marks of the structures, too.
local function run(body, passes, thorough)
  local answer = open(passes, thorough) or body()
  settle()
  return answer
end

-- Run a script that only reads. Pending changes count as applied; the function gets the revision and operation of the
-- last change that is applied. `thorough`: check the marks of the structures, too.
local function look(body, thorough)
  local refused = read_head()
  if refused then return refused end
  CLOCK = tonumber(CLOCK)
  if thorough and not is_marked() then return {'wiped'} end
  if KNOWN ~= '' and KNOWN ~= INC then return {'incarnation', INC} end
  OVERDUE = #redis.call('ZRANGEBYSCORE', LEASES, '-inf', CLOCK, 'LIMIT', 0, 1) > 0
  local made, by = REV, LAST_OP
  recall()
  return body(made, by)
end
