-- Put and delete keys if all comparisons hold. It serves put, create, compare-and-put, delete, transactions, and the
-- keys that a process registers under its lease.
--
-- KEYS    1-7 the registry's structures   8 the lease's TTL key, if there is a lease
-- ARGV    1 incarnation or ''   2 operation id
--         3 for a repeated call, a log entry from before the first one, as 'revision operation'; else ''
--         4 lease or ''   5 TTL in ms with which an ended lease is granted; 0: do not grant it
--         6 msgpack {comparisons, operations}
--           a comparison {key, mod_revision}, '' for "absent"
--           an operation {'p', key, value, owned} or {'d', key, '', owned}; with owned = 1 it has no effect
--           unless the key is under this lease
-- Answers {'ok', last revision, 1 if the lease was granted (2: perhaps, and it was renewed), number of changes,
--          operation of the lease's previous write: '' if there is none, nil if it is unknown}
--         {'failed', index of the comparison from 0, the packed record found or ''}: nothing was written
--         {'large', bytes}: nothing was written; the records under its keys are too large for one call
--         {'no-lease'}: nothing was written, or the written keys have ended with the lease
--         {'again'}: nothing was written; the lease has ended, and some of its keys still have to be deleted
--         {'unknown'}: nothing was written now; it is no longer known whether the first call wrote
-- Atomic: and once for an operation id. A repeated call searches the newest SEARCH entries of the log, back to the
--         entry in ARGV 3, for those of the first call, and answers as that did. If that wrote nothing, the call
--         is evaluated again. A call that only deletes succeeds on a full server.

local SEARCH = 1000
local ENTRY_BYTES = 4096

local ALWAYS_FIT = 2

local lease, ttl_ms = ARGV[4], tonumber(ARGV[5])

-- Return the revision of the first call's last change, and the number of its changes; nil if none was found. The third
-- value is true if the search is complete. An entry with a long value counts as several, so that the bytes that a
-- call copies are bounded, too.
local function find_first_answer(bottom)
  local revision, changes, before, seen = nil, 0, '+', 0
  while seen < SEARCH do
    local entries = redis.call('XREVRANGE', LOG, before, '-', 'COUNT', 4)
    for _, entry in ipairs(entries) do
      local id, kind, value, operation = entry[1], entry[2][2], entry[2][6], entry[2][14]
      if operation == OPERATION then
        if kind == 'p' or kind == 'd' then revision, changes = revision or id, changes + 1 end
      elseif revision or id .. ' ' .. operation == bottom then
        return revision, changes, true -- the entries of a call are consecutive
      end
      before, seen = '(' .. id, seen + 1 + math.floor(#value / ENTRY_BYTES)
    end
    if #entries < 4 then return revision, changes, true end
  end
  return revision, changes, false
end

local function renew()
  redis.call('ZADD', LEASES, CLOCK + ttl_ms, lease)
  redis.call('SET', KEYS[8], INC, 'PX', ttl_ms)
end

-- Return the operation of the lease's last write, and of the one before it.
local function last_writes()
  local last = lease ~= '' and redis.call('HGET', LR, lease) or ''
  local operation, before = string.match(last, '^%S+ (%S+) (%S*)$')
  return operation or '', before
end

local function answer_again()
  local revision, changes, certain = find_first_answer(ARGV[3])
  if not revision then return not certain and {'unknown'} or nil end
  if lease == '' then return {'ok', revision, 0, changes, ''} end
  if is_alive(lease) then
    local operation, before = last_writes()
    if ttl_ms > 0 then renew() end
    return {'ok', revision, ttl_ms > 0 and 2 or 0, changes, operation == OPERATION and before}
  end
  if ttl_ms == 0 then return {'no-lease'} end
end

-- As `current`, but a damaged record counts as one of this lease if the lease lists its key.
local function standing(key)
  local old, packed, ended = current(key)
  if old and old[1] == '' and lease ~= '' and redis.call('ZSCORE', LK, lease .. '\0' .. key) then
    old[4] = lease
  end
  return old, packed, ended
end

local function put(key, value, owned)
  local old, _, ended = standing(key)
  if owned == 1 and not (old and old[4] == lease) then return 0 end
  if ended then
    local _, deadline = is_alive(ended[4])
    remove(key, cause(deadline or 0), ended[4])
  end
  local create, version, before = '', 1, ''
  if old then create, version, before = old[2], old[3] + 1, old[4] end
  plan(emit('p', key, value, lease, create, version), 'p', key, value, lease, create, version, before)
  return 1
end

local function delete(key, owned)
  local old, _, ended = standing(key)
  if not old and not ended then redis.call('ZREM', IDX, key) end -- a name without a record
  if not old or (owned == 1 and old[4] ~= lease) then return 0 end
  remove(key, 'd', old[4])
  return 1
end

local request = cmsgpack.unpack(ARGV[6])
local only_deletes = #request[2] > 0
for _, operation in ipairs(request[2]) do only_deletes = only_deletes and operation[1] == 'd' end

-- Return the bytes of the records under the keys of the request, if there are several: the bytes that a call copies
-- are bounded.
local function concerned_bytes()
  local bytes = 0
  if #request[1] + #request[2] <= ALWAYS_FIT then return bytes end
  for _, part in ipairs(request[1]) do bytes = bytes + redis.call('HSTRLEN', KV, part[1]) end
  for _, operation in ipairs(request[2]) do bytes = bytes + redis.call('HSTRLEN', KV, operation[2]) end
  return bytes
end

return run(function()
  local answer = ARGV[3] ~= '' and answer_again()
  if answer then return answer end
  local bytes = concerned_bytes()
  if bytes > COPIED_BYTES then return {'large', bytes} end

  for index, comparison in ipairs(request[1]) do
    local found, packed = current(comparison[1])
    if (found and found[1] or '') ~= comparison[2] then return {'failed', index - 1, packed or ''} end
  end

  local granted = 0
  if lease ~= '' then
    local alive, deadline = is_alive(lease)
    if not alive then
      if ttl_ms == 0 then return {'no-lease'} end
      if deadline then -- none of its old keys may live under the new grant
        local _, gone = finish(lease, cause(deadline), REAP_KEYS)
        if not gone then return {'again'} end
      end
      renew()
      granted = 1
    end
  end

  local changes, before = 0, last_writes()
  for _, operation in ipairs(request[2]) do
    local kind, key, value, owned = operation[1], operation[2], operation[3], operation[4]
    changes = changes + (kind == 'p' and put(key, value, owned) or kind == 'd' and delete(key, owned))
  end
  settle()
  if lease ~= '' and changes > 0 then redis.call('HSET', LR, lease, REV .. ' ' .. OPERATION .. ' ' .. before) end
  return {'ok', REV, granted, changes, before}
end, only_deletes)
