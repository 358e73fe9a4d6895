-- The service clock, which the deadlines of leases count on. It stands in `meta` as `clock`, ms, and `seen`, what
-- TIME said then.

local MAX_STEP_MS = 1000
local KEEP_CLOCK_MS = 50

-- What the clock shows, and how long it has not been kept; both in ms, and TIME in ms.
--
-- Time passes on it only while scripts run, and by at most MAX_STEP_MS between two of them: a server that was
-- frozen, restarted or replaced, and a clock that stepped, cost no lease. It is kept every KEEP_CLOCK_MS, and
-- worked out by each script in between.
local function read_clock(clock, seen)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local passed = now - seen
  return clock + math.max(0, math.min(passed, MAX_STEP_MS)), math.abs(passed), now
end
