"""One writer on one of the three stores.

Run as `python -m benchmarks.registry.rivals.writer SIDE ADDRESS PUTS_PER_S`.

It writes small instance records at a fixed rate, over and over the same hundred keys, until it is ended. Each
value begins with the time at which it was sent, in ns on this machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop

from benchmarks.registry.stores import PREFIX, SIDES

STAMP_BYTES = 20
KEYS = 100


def record(number: int) -> bytes:
    """Return an instance record as the runtime writes it."""
    fields = {
        "type": "Endpoint",
        "namespace": "dynamo",
        "component": "backend",
        "endpoint": "generate",
        "instance_id": 7587888160958627806 + number,
        "transport": {
            "tcp": f"10.0.{number >> 8 & 255}.{number & 255}:37145/"
            f"{7587888160958627806 + number:x}/dynamo/backend/generate"
        },
        "version": 1,
        "ready": True,
        "started_at": 1756927703.22,
        "secret": f"{number:064x}",
    }
    return json.dumps(fields, separators=(",", ":")).encode()


async def main(side: str, address: str, rate: float) -> None:
    """Write on schedule: a put that takes long does not delay later ones."""
    store = SIDES[side](address)
    await store.start()
    running: set[asyncio.Task[None]] = set()
    due, number = time.monotonic(), 0
    while True:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        key, body = f"{PREFIX}{number % KEYS:016x}", record(number)
        value = f"{time.monotonic_ns():0{STAMP_BYTES}}".encode() + body
        task = asyncio.create_task(store.put(key, value))
        running.add(task)
        task.add_done_callback(running.discard)
        due, number = due + 1 / rate, number + 1


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
