-- What every registry script begins with.
--
-- KEYS  1 meta  2 kv  3 idx  4 leases  5 lk  6 lr  7 log   (8: a lease's TTL key, where a script says so)
-- ARGV  1 the incarnation the caller knows, '' for any   2 operation id of this call
--
-- `open` must be called first. It answers what the script has to return at once, or nil:
--   {'schema', found}        the registry was written by an incompatible release; nothing was touched
--   {'wiped'}                there is no registry, or one of its structures is gone: run registry_init
--   {'incarnation', found}   it is not the registry the caller knows
-- Otherwise the service clock has been advanced and up to REAP_LEASES ended leases have been reaped.
--
-- All of a script's effects are atomic. Each touches the seven structures of one hash tag and nothing else.

local META, KV, IDX, LEASES, LK, LR, LOG = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local KNOWN, OPERATION = ARGV[1], ARGV[2]
local MAJOR = '1'
local REAP_LEASES = 64
local LOG_FLOOR = 10000
local MAX_STEP_MS = 1000

-- The registry's head, filled by `open`: incarnation, last log id, its operation, service clock in ms.
local INC, REV, LAST_OP, CLOCK

-- Whether each structure carries the incarnation that `meta` names: losing any one of them is a wipe.
-- The log carries it by its last entry, which must be the one `meta` names, unless it was trimmed empty.
local function is_whole()
  if not INC then return false end
  if redis.call('HGET', KV, '') ~= INC or redis.call('HGET', LR, '') ~= INC then return false end
  for _, key in ipairs({IDX, LEASES, LK}) do
    if not redis.call('ZSCORE', key, '\0' .. INC) then return false end
  end
  local last = redis.call('XREVRANGE', LOG, '+', '-', 'COUNT', 1)[1]
  if last then return last[1] == REV end
  return redis.call('EXISTS', LOG) == 1
end

-- Time passes on the service clock only while scripts run, and by at most MAX_STEP_MS between two of them:
-- a server that was frozen, restarted or replaced, and a clock that stepped, cost no lease.
local function advance_clock(clock, seen)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  CLOCK = clock + math.max(0, math.min(now - seen, MAX_STEP_MS))
  if now ~= seen then redis.call('HSET', META, 'clock', CLOCK, 'seen', now) end
end

-- Append to the change log; answer the entry's id, which is the revision of the change.
-- kind: p put, d deleted, r revoked, x expired, i a new incarnation (in v).
local function emit(kind, key, value, lease, create, version)
  local keep = math.max(LOG_FLOOR, 4 * redis.call('ZCARD', IDX))
  local id = redis.call('XADD', LOG, 'MAXLEN', '~', keep, '*', 'o', kind, 'k', key, 'v', value, 'l', lease,
    'c', create, 'n', version, 'w', OPERATION, 'p', REV, 'q', LAST_OP)
  REV, LAST_OP = id, OPERATION
  redis.call('HSET', META, 'rev', REV, 'op', LAST_OP)
  return id
end

-- A record is cmsgpack {mod_revision, create_revision, version, lease or '', value}.
local function load(key)
  local packed = redis.call('HGET', KV, key)
  if packed then return cmsgpack.unpack(packed), packed end
end

local function remove(key, kind, lease)
  redis.call('HDEL', KV, key)
  redis.call('ZREM', IDX, key)
  if lease ~= '' then redis.call('ZREM', LK, lease .. '\0' .. key) end
  emit(kind, key, '', lease, '', 0)
end

-- End a lease: delete its keys, logging each with the cause `kind`, and forget it.
local function finish(lease, kind)
  for _, member in ipairs(redis.call('ZRANGEBYLEX', LK, '[' .. lease .. '\0', '(' .. lease .. '\1')) do
    remove(string.sub(member, #lease + 2), kind, lease)
  end
  redis.call('ZREM', LEASES, lease)
  redis.call('HDEL', LR, lease)
end

-- Whether a lease lives. One that has run out, but was beyond the bound of this call's reaping, ends now.
local function is_alive(lease)
  local deadline = redis.call('ZSCORE', LEASES, lease)
  if not deadline then return false end
  if tonumber(deadline) > CLOCK then return true end
  finish(lease, 'x')
  return false
end

-- The live record of a key, and its packed form; nil if there is none.
local function current(key)
  local record, packed = load(key)
  if record and record[4] ~= '' and not is_alive(record[4]) then return nil end
  return record, packed
end

local function open()
  local meta = redis.call('HMGET', META, 'schema', 'inc', 'rev', 'op', 'clock', 'seen')
  if meta[1] and string.match(meta[1], '^%d+') ~= MAJOR then return {'schema', meta[1]} end
  INC, REV, LAST_OP = meta[2], meta[3], meta[4]
  if not is_whole() then return {'wiped'} end
  if KNOWN ~= '' and KNOWN ~= INC then return {'incarnation', INC} end
  advance_clock(tonumber(meta[5]), tonumber(meta[6]))
  for _, lease in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', CLOCK, 'LIMIT', 0, REAP_LEASES)) do
    finish(lease, 'x')
  end
end
