-- Remove an event stream to which nothing was appended, and which no reader has used, for long.
--
-- KEYS     as in stream_prelude: 1 entries   2 head   3 groups   4 sizes
-- ARGV[1]  the major version of the head
-- ARGV[2]  ms of rest
-- Answers  1 removed, 0 left alone
-- Atomic:  a group that is created afterwards creates the stream.
local head = redis.call('HMGET', KEYS[2], 'v', 'seen')
if head[1] and string.match(head[1], '^%d+') ~= ARGV[1] then
  return 0
end
local last = tonumber(head[2] or '') or 0
if redis.call('EXISTS', KEYS[1]) == 1 then
  local about = redis.call('XINFO', 'STREAM', KEYS[1])
  for i = 1, #about, 2 do
    if about[i] == 'last-generated-id' then
      last = math.max(last, tonumber(string.match(about[i + 1], '^%d+')))
    end
  end
end
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) - last < tonumber(ARGV[2]) then
  return 0
end
return redis.call('UNLINK', unpack(KEYS)) > 0 and 1 or 0
