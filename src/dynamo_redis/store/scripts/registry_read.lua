-- Read keys, and the state of a lease with the names of its keys. Writes nothing.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id   3 lease or ''
--         4 name after which to continue, or ''   5 most names to answer   6 bytes of records at which an answer
--         ends   7… keys
-- Answers {'ok', incarnation, revision, operation, 1 if the lease is alive, last write of its owner or '',
--         names of its keys in order, then for each key its packed record or '', up to that number of bytes}
--         {'unmade'}: a lease is to be read, and logged changes are not yet applied: tick, and read again
-- Atomic: one moment. Records of ended leases are left out.

return look(function(made)
  local lease, after, most, most_bytes = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
  if lease ~= '' and made ~= REV then return {'unmade'} end
  local alive = lease ~= '' and is_alive(lease)
  local names = {}
  if alive then
    local from = (after == '' and '[' or '(') .. lease .. '\0' .. after
    for _, member in ipairs(redis.call('ZRANGEBYLEX', LK, from, '(' .. lease .. '\1', 'LIMIT', 0, most)) do
      names[#names + 1] = string.sub(member, #lease + 2)
    end
  end
  local last_write = alive and redis.call('HGET', LR, lease) or ''
  local answer, bytes = {'ok', INC, REV, LAST_OP, alive and 1 or 0, last_write, names}, 0
  for index = 7, #ARGV do
    if bytes >= most_bytes then break end
    local _, packed = current(ARGV[index])
    answer[#answer + 1] = packed or ''
    bytes = bytes + #(packed or '')
  end
  return answer
end)
