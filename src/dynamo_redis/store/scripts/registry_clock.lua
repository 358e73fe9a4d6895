-- The service clock, by which the deadlines of leases count. `meta` holds it as `clock`, in ms, and `seen`, the TIME
-- of the server when it was saved.

local LATE_MS = 900
local KEEP_CLOCK_MS = 50

-- Return the service clock, the time since it was saved, and TIME; all in ms.
--
-- The clock advances only while scripts save it: a gap of more than LATE_MS does not count. So no lease ends because
-- a server was frozen, restarted or replaced, because it refused writes, or because its clock stepped. The clock is
-- saved every KEEP_CLOCK_MS, and computed by each script in between.
local function read_clock(clock, seen)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local passed = now - seen
  if passed < 0 or passed > LATE_MS then return clock + 0, math.abs(passed), now end
  return clock + passed, passed, now
end

-- 1 once a write has found the server's memory full.
local FULL = 0

-- Make a script's first write, even if the server's memory is full.
--
-- A full server refuses a command that may need memory only as the first write of a script, since a later refusal
-- would leave the script half done. A script that frees memory or renews a lease must succeed. So its first write
-- is one that needs no memory and has no effect.
local function write_when_full(...)
  local answer = redis.pcall(...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  redis.call('HDEL', KEYS[1], '')
  local again = redis.call(...)
  FULL = 1
  return again
end
