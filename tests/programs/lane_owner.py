"""Starts three lanes, of which one works and one sleeps: `lane_owner.py PROGRAM`, the program of their jobs.

Prints the process ids of the lanes' processes.
"""

from __future__ import annotations

import asyncio
import sys

from dynamo_redis.jobs.lane import Lane


async def main(program: str) -> None:
    lanes = [Lane((sys.executable, program), time_s=1, idle_s=60, queue_count=9) for _ in "abc"]
    print(*[int(await lane.run(b"pid")) for lane in lanes], flush=True)
    await asyncio.gather(lanes[0].run(b"spin"), lanes[1].run(b"sleep"))


asyncio.run(main(sys.argv[1]))
