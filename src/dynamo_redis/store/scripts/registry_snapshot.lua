-- Read one page of the keys under a prefix, in order.
--
-- KEYS    1-7 the registry's structures
-- ARGV    1 incarnation or ''   2 operation id   3 prefix   4 key to go on behind, or ''   5 most keys to answer
-- Answers {'ok', incarnation, revision, operation, last key looked at or '' if no more are left,
--         key, packed record, key, packed record, …}
-- Atomic: one page is one moment. Records of ended leases are not shown.

local refused = open()
if refused then return refused end
local prefix, after, limit = ARGV[3], ARGV[4], tonumber(ARGV[5])
-- No key begins with a zero byte (the structure's own mark does), and none holds the byte 255.
local from = after ~= '' and '(' .. after or '[' .. (prefix ~= '' and prefix or '\1')
local keys = redis.call('ZRANGEBYLEX', IDX, from, '(' .. prefix .. '\255', 'LIMIT', 0, limit)
local ended = {}
local some_ended = false
for _, lease in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', CLOCK)) do
  ended[lease] = true
  some_ended = true
end
local answer = {'ok', INC, REV, LAST_OP, #keys == limit and keys[#keys] or ''}
if #keys > 0 then
  local records = redis.call('HMGET', KV, unpack(keys))
  for index, packed in ipairs(records) do
    if not (some_ended and ended[cmsgpack.unpack(packed)[4]]) then
      answer[#answer + 1] = keys[index]
      answer[#answer + 1] = packed
    end
  end
end
return answer
