-- Put and delete keys, if all comparisons hold. The one script behind put, create, compare-and-put, delete,
-- transactions, and the keys that a process registers under its lease.
--
-- KEYS    1-7 the registry's structures   8 the lease's TTL key, if there is a lease
-- ARGV    1 incarnation or ''   2 operation id   3 '1' if this repeats the operation, else '0'
--         4 lease or ''   5 TTL in ms to grant the lease with if it is not alive; 0: do not grant
--         6 msgpack {comparisons, operations}
--           a comparison {key, mod_revision}, '' for "absent"
--           an operation {'p', key, value, owned} or {'d', key, '', owned}; with owned = 1 it has no effect
--           unless the key stands under this lease
-- Answers {'ok', last revision, 1 if the lease was granted, changes made}
--         {'failed', index of the comparison from 0, the packed record found or ''}: nothing was written
--         {'no-lease'}: nothing was written
-- Atomic, and once for an operation id: a repeated call finds the first one's entries among the newest
-- SEARCH of the log, and answers as it did. What wrote nothing is evaluated again.

local SEARCH = 2000

local function find_first_answer()
  local revision, changes, before, seen = nil, 0, '+', 0
  while seen < SEARCH do
    local entries = redis.call('XREVRANGE', LOG, before, '-', 'COUNT', 100)
    for _, entry in ipairs(entries) do
      local fields = entry[2]
      if fields[14] == OPERATION and (fields[2] == 'p' or fields[2] == 'd') then
        revision = revision or entry[1]
        changes = changes + 1
      end
      before = '(' .. entry[1]
    end
    seen = seen + 100
    if #entries < 100 then break end
  end
  if revision then return {'ok', revision, 0, changes} end
end

local function put(key, value, lease, owned)
  local old = current(key)
  if owned == 1 and not (old and old[4] == lease) then return 0 end
  local create, version = '', 1
  if old then
    create, version = old[2], old[3] + 1
    if old[4] ~= '' and old[4] ~= lease then redis.call('ZREM', LK, old[4] .. '\0' .. key) end
  else
    redis.call('ZADD', IDX, 0, key)
  end
  if lease ~= '' then redis.call('ZADD', LK, 0, lease .. '\0' .. key) end
  local id = emit('p', key, value, lease, create, version)
  if create == '' then create = id end
  redis.call('HSET', KV, key, cmsgpack.pack({id, create, version, lease, value}))
  return 1
end

local function delete(key, lease, owned)
  local old = current(key)
  if not old or (owned == 1 and old[4] ~= lease) then return 0 end
  remove(key, 'd', old[4])
  return 1
end

local refused = open()
if refused then return refused end
if ARGV[3] == '1' then
  local answer = find_first_answer()
  if answer then return answer end
end

local lease, ttl_ms = ARGV[4], tonumber(ARGV[5])
local request = cmsgpack.unpack(ARGV[6])
for index, comparison in ipairs(request[1]) do
  local found, packed = current(comparison[1])
  if (found and found[1] or '') ~= comparison[2] then return {'failed', index - 1, packed or ''} end
end

local granted = 0
if lease ~= '' and not is_alive(lease) then
  if ttl_ms == 0 then return {'no-lease'} end
  redis.call('ZADD', LEASES, CLOCK + ttl_ms, lease)
  redis.call('SET', KEYS[8], INC, 'PX', ttl_ms)
  granted = 1
end

local changes = 0
for _, operation in ipairs(request[2]) do
  local kind, key, value, owned = operation[1], operation[2], operation[3], operation[4]
  changes = changes + (kind == 'p' and put(key, value, lease, owned) or kind == 'd' and delete(key, lease, owned))
end
if lease ~= '' and changes > 0 then redis.call('HSET', LR, lease, REV .. ' ' .. OPERATION) end
return {'ok', REV, granted, changes}
