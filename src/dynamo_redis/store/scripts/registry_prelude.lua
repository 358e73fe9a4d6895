-- What every registry script but registry_keepalive begins with, after registry_clock.
--
-- KEYS  1 meta  2 kv  3 idx  4 leases  5 lk  6 lr  7 log   (8: a lease's TTL key, where a script says so)
-- ARGV  1 the incarnation the caller knows, '' for any   2 operation id of this call
--
-- A script is `return run(function() … end)`. Instead of the function's answer it may give one of these:
--   {'schema', found}        the registry was written by an incompatible release; nothing was touched
--   {'wiped'}                there is no registry, or one of its structures is gone: run registry_init
--   {'incarnation', found}   it is not the registry the caller knows
-- Otherwise the service clock has been advanced and some of the ended leases have been reaped: of up to
-- REAP_LEASES leases, up to REAP_KEYS keys. What is left of an ended lease is shown to nobody.
--
-- All of a script's effects are atomic. Each touches the seven structures of one hash tag and nothing else.

local META, KV, IDX, LEASES, LK, LR, LOG = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local KNOWN, OPERATION = ARGV[1], ARGV[2]
local MAJOR = '1'
local REAP_LEASES = 64
local REAP_KEYS = 256
local LOG_FLOOR = 10000
local REVOKED = -1

-- The registry's head, filled by `open`: incarnation, last log id, its operation, service clock in ms, and for
-- how many ms it had not been kept.
local INC, REV, LAST_OP, CLOCK, IDLE_MS

-- Whether ended leases may be left. If not, every lease in LEASES lives, and so does that of every key.
local OVERDUE = false

-- Whether META has to be told of new log entries, and how many entries the log keeps.
local changed, keep = false, nil

-- Whether each structure carries the incarnation that `meta` names: losing any one of them is a wipe.
-- The log carries it by its last entry, which must be the one `meta` names, unless it was trimmed empty.
local function is_marked()
  if redis.call('HGET', KV, '') ~= INC or redis.call('HGET', LR, '') ~= INC then return false end
  for _, key in ipairs({IDX, LEASES, LK}) do
    if not redis.call('ZSCORE', key, '\0' .. INC) then return false end
  end
  local last = redis.call('XREVRANGE', LOG, '+', '-', 'COUNT', 1)[1]
  return not last or last[1] == REV
end

-- Append to the change log; answer the entry's id, which is the revision of the change.
-- kind: p put, d deleted, r revoked, x expired, i a new incarnation (in v).
local function emit(kind, key, value, lease, create, version)
  keep = keep or math.max(LOG_FLOOR, 4 * redis.call('ZCARD', IDX))
  local id = redis.call('XADD', LOG, 'MAXLEN', '~', keep, '*', 'o', kind, 'k', key, 'v', value, 'l', lease,
    'c', create, 'n', version, 'w', OPERATION, 'p', REV, 'q', LAST_OP)
  REV, LAST_OP, changed = id, OPERATION, true
  return id
end

local function remove(key, kind, lease)
  redis.call('HDEL', KV, key)
  redis.call('ZREM', IDX, key)
  if lease ~= '' then redis.call('ZREM', LK, lease .. '\0' .. key) end
  emit(kind, key, '', lease, '', 0)
end

-- Why a lease that is not alive has ended. REVOKED stands for the deadline while its keys go.
local function cause(deadline)
  return tonumber(deadline) == REVOKED and 'r' or 'x'
end

-- Delete up to `most` keys of an ended lease, logging each, and the lease itself if no more are left.
-- Answers how many were deleted and whether the lease is gone.
local function finish(lease, kind, most)
  local members = redis.call('ZRANGEBYLEX', LK, '[' .. lease .. '\0', '(' .. lease .. '\1', 'LIMIT', 0, most)
  for _, member in ipairs(members) do remove(string.sub(member, #lease + 2), kind, lease) end
  if #members == most then return most, false end
  redis.call('ZREM', LEASES, lease)
  redis.call('HDEL', LR, lease)
  return #members, true
end

-- Whether a lease lives, and its deadline: nil if it is unknown.
local function is_alive(lease)
  local deadline = redis.call('ZSCORE', LEASES, lease)
  if not deadline then return false, nil end
  return tonumber(deadline) > CLOCK, deadline
end

-- The live record of a key, {mod_revision, create_revision, version, lease or '', value}, and its packed
-- form; nil if there is none. Then, third, what an ended lease has left there.
local function current(key)
  local packed = redis.call('HGET', KV, key)
  if not packed then return nil end
  local record = cmsgpack.unpack(packed)
  if OVERDUE and record[4] ~= '' and not is_alive(record[4]) then return nil, nil, record end
  return record, packed
end

-- How many leases live, and how many ended ones are left for the next call.
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

-- What to answer at once, or nil: then the head above is filled. The marks are looked at by the first script
-- of each second; that each structure is there at all, by every one.
local function open(thorough)
  local meta = redis.call('HMGET', META, 'schema', 'inc', 'rev', 'op', 'clock', 'seen')
  if meta[1] and meta[1] ~= MAJOR and string.match(meta[1], '^%d+') ~= MAJOR then return {'schema', meta[1]} end
  INC, REV, LAST_OP = meta[2], meta[3], meta[4]
  if not INC or redis.call('EXISTS', KV, IDX, LEASES, LK, LR, LOG) ~= 6 then return {'wiped'} end
  local now
  CLOCK, IDLE_MS, now = read_clock(meta[5], meta[6])
  local new_second = math.floor(now / 1000) ~= math.floor(meta[6] / 1000)
  if (thorough or new_second) and not is_marked() then return {'wiped'} end
  if KNOWN ~= '' and KNOWN ~= INC then return {'incarnation', INC} end
  local ended = redis.call('ZRANGEBYSCORE', LEASES, '-inf', CLOCK, 'WITHSCORES', 'LIMIT', 0, REAP_LEASES)
  -- A time at which a lease was found ended must not be unmade by a clock that steps back.
  if new_second or #ended > 0 or IDLE_MS >= KEEP_CLOCK_MS then
    redis.call('HSET', META, 'clock', CLOCK, 'seen', now)
  end
  if #ended > 0 then reap(ended) end
end

local function close(answer)
  if changed then redis.call('HSET', META, 'rev', REV, 'op', LAST_OP) end
  return answer
end

local function run(body)
  return open() or close(body())
end
