"""Many watches on one of the three stores, in one process.

`python -m benchmarks.registry.rivals.watchers SIDE ADDRESS COUNT`. Each value that they see begins with the
time at which it was sent, in ns of this machine's monotonic clock. Prints `ready` when each watch has seen
one. After a line on standard input it discards its measurements, and after a second one it answers a line of
JSON: for each watch a list of the µs from sent to seen.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time

import uvloop

from benchmarks.registry.rivals.writer import STAMP_BYTES, record
from benchmarks.registry.stores import SIDES, Store


async def follow(store: Store, seen_us: list[float]) -> None:
    """Note the delay of each value, in µs."""
    async for value in store.watch():
        late_us = (time.monotonic_ns() - int(value[:STAMP_BYTES])) / 1e3
        seen_us.append(late_us)


async def main(side: str, address: str, count: int) -> None:
    """Watch until told to stop."""
    stores = [SIDES[side](address) for _ in range(count)]
    seen: list[list[float]] = [[] for _ in stores]
    for number, store in enumerate(stores):
        await store.start()
        await store.keep(f"v1/processes/{os.getpid()}-{number}", record(number))
    tasks = [asyncio.create_task(follow(*pair)) for pair in zip(stores, seen, strict=True)]
    while not all(seen):
        await asyncio.sleep(0.05)
        if ended := [task for task in tasks if task.done()]:
            raise RuntimeError(f"a watch ended: {ended[0]}")
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for times in seen:
        times.clear()
    await asyncio.to_thread(sys.stdin.readline)
    print(json.dumps(seen), flush=True)
    # The process ends here, and needs no clean-up.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
