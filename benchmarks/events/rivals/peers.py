"""One client process of one side of suite `events`.

`python -m benchmarks.events.rivals.peers MODULE URL` connects, and says `ready`. Then it answers each line of
JSON, `[OPERATION, EVENTS, EVENTS_A_BATCH]`, by one: the seconds of the operation, and the CPU seconds of this
process.

    publish   durably, all confirmed; with 1 event a batch, each is an entry or message of its own
    consume   read and acknowledge events; they are published before, which is not timed

Both leave an empty stream behind. The process ends with its standard input.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from importlib import import_module
from typing import Protocol

import uvloop

PATIENCE_S = 120.0


class Peer(Protocol):
    """A client of one kind of server."""

    async def publish(self, count: int, batch_count: int) -> None:
        """Publish `count` events, and wait until all are confirmed."""
        ...

    async def prepare(self) -> None:
        """Create the group or consumer to consume with, before anything is published."""
        ...

    async def consume(self, count: int, batch_count: int) -> None:
        """Read and acknowledge `count` events that are in the stream."""
        ...

    async def purge(self) -> None:
        """Delete all that was published."""
        ...

    async def aclose(self) -> None: ...


async def measure(peer: Peer, operation: str, count: int, batch_count: int) -> dict[str, float]:
    """Run one operation. Raises TimeoutError if it hangs."""
    async with asyncio.timeout(PATIENCE_S):
        if operation == "consume":
            await peer.prepare()
            await peer.publish(count, batch_count)
        run = peer.consume if operation == "consume" else peer.publish
        gc.collect()
        began, cpu = time.perf_counter(), time.process_time()
        await run(count, batch_count)
        took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
        await peer.purge()
    return took


async def main(name: str, url: str) -> None:
    """Answer the suite's lines until the input ends."""
    peer: Peer = await import_module(f"benchmarks.events.rivals.{name}").connect(url)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await measure(peer, *json.loads(line))), flush=True)
    await peer.aclose()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
