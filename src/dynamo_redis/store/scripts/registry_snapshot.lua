-- Read one page of the keys under a prefix, in order.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id   3 prefix   4 key to go on behind, or ''   5 most keys to answer
--         6 bytes of records at which a page ends
-- Answers {'ok', incarnation, revision and operation of the last change that is in the records, revision and
--         operation of the last one that is logged, last key looked at or '' if no more are left,
--         key, packed record, key, packed record, …}
-- Atomic: one page is one moment. Records of ended leases are not shown, and no name without a record; what is logged
--         and not yet made may be in the records or not. Writes nothing.

local CHUNK = 64

return look(function(made, by)
  local prefix, after, most, most_bytes = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
  -- No key begins with a zero byte (the structure's own mark does), and none holds the byte 255.
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
  -- One record first, then more each time: how large they are is not known before they are read.
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
