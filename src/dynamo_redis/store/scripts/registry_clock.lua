-- The service clock, which the deadlines of leases count on. It stands in `meta` as `clock`, ms, and `seen`, what
-- TIME said then.

local LATE_MS = 900
local KEEP_CLOCK_MS = 50

-- What the clock shows, and how long it has not been kept; both in ms, and TIME in ms.
--
-- Time passes on it only while scripts keep it: a time of more than LATE_MS without one counts for nothing. So a
-- server that was frozen, restarted or replaced, one that refused writes, and a clock that stepped, cost no
-- lease. It is kept every KEEP_CLOCK_MS, and worked out by each script in between.
local function read_clock(clock, seen)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local passed = now - seen
  if passed < 0 or passed > LATE_MS then return clock + 0, math.abs(passed), now end
  return clock + passed, passed, now
end

-- 1 if the server's memory was found to be full.
local FULL = 0

-- Make a script's first write, though the server's memory is full.
--
-- A full server refuses a command that may take memory only as the first write of a script: later ones would leave
-- it half done. So a script that must pass, since it gives memory back or keeps a lease alive, begins with a
-- write of the other kind, one that has no effect.
local function write_when_full(...)
  local answer = redis.pcall(...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  redis.call('HDEL', KEYS[1], '')
  local again = redis.call(...)
  FULL = 1
  return again
end
