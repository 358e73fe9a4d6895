-- Read keys, and the state of a lease.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id   3 lease or ''   4… keys
-- Answers {'ok', incarnation, revision, operation, 1 if the lease is alive, its owner's last write or '',
--         then for each key its packed record or ''}
-- Atomic: one moment. Records of ended leases are not shown.

local refused = open()
if refused then return refused end
local lease = ARGV[3]
local alive = lease ~= '' and is_alive(lease)
local records = {}
for index = 4, #ARGV do
  local _, packed = current(ARGV[index])
  records[#records + 1] = packed or ''
end
local last_write = alive and redis.call('HGET', LR, lease) or ''
local answer = {'ok', INC, REV, LAST_OP, alive and 1 or 0, last_write}
for _, record in ipairs(records) do answer[#answer + 1] = record end
return answer
