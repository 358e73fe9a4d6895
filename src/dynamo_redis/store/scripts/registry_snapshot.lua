-- Read one page of the keys under a prefix, in order. Writes nothing.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id   3 prefix   4 key after which to continue, or ''   5 most keys
--         6 bytes of records at which a page ends
-- Answers {'ok', incarnation, revision and operation of the last change applied to the records, revision and
--         operation of the last logged change, last key read or '' if no more keys are left,
--         key, packed record, key, packed record, …}
-- Atomic: one page is one moment. Records of ended leases, and names without a record, are left out. A change that
--         is logged and not yet applied may be in the records or not.

local CHUNK = 64

return look(function(made, by)
  local prefix, after, most, most_bytes = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
  -- No key begins with a zero byte, as the structure's mark does, and no key contains the byte 255.
  local from = after ~= '' and '(' .. after or '[' .. (prefix ~= '' and prefix or '\1')
  local keys = redis.call('ZRANGEBYLEX', IDX, from, '(' .. prefix .. '\255', 'LIMIT', 0, most)
  local answer, bytes, seen = {'ok', INC, made, by, REV, LAST_OP, ''}, 0, 0
  local alive = {}
  local function is_shown(packed)
    if not packed then return false end
    if not OVERDUE then return true end
    local lease = read_record(packed)[4]
    if lease == '' then return true end
    if alive[lease] == nil then alive[lease] = is_alive(lease) end
    return alive[lease]
  end
  -- One record first, then twice as many each time, since their sizes are unknown before they are read.
  local chunk = 1
  while seen < #keys and bytes < most_bytes do
    local last = math.min(seen + chunk, #keys)
    for _, packed in ipairs(redis.call('HMGET', KV, unpack(keys, seen + 1, last))) do
      seen = seen + 1
      if is_shown(packed) then
        answer[#answer + 1] = keys[seen]
        answer[#answer + 1] = packed
        bytes = bytes + #packed
        if bytes >= most_bytes then break end
      end
    end
    chunk = math.min(2 * chunk, CHUNK)
  end
  if seen < #keys or #keys == most then answer[7] = keys[seen] end
  return answer
end)
