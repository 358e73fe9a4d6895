"""R10 and R11 on a server of their own: see `object_driver.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import uvloop

from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured
from benchmarks.registry.object_driver import r10, r11


def model_file(rounds: int) -> dict[str, Measured]:
    """Measure R10, in ms."""
    ours, plain = _run(r10, rounds)
    for number, (one, other) in enumerate(zip(ours, plain, strict=True), 1):
        print(f"R10 round {number}: {one:.0f} ms, plain SET and GET {other:.0f} ms", flush=True)
    return {"R10": Measured.against(ours, plain)}


def large_object(rounds: int) -> dict[str, Measured]:
    """Measure R11, in ms, without an append-only file. With one, the figure would be the disk's: Redis waits
    while a gigabyte is synced, whichever program wrote it."""
    print("R11: on a server without an append-only file", flush=True)
    return {"R11": Measured.against(*_run(r11, rounds, appendonly="no"))}


def _run(
    measure: Callable[[str, int], Awaitable[tuple[list[float], list[float]]]], rounds: int, **settings: str
) -> tuple[list[float], list[float]]:
    async def run(redis_url: str) -> tuple[list[float], list[float]]:
        return await measure(redis_url, rounds)

    with redis_server(settings=settings) as server:
        return uvloop.run(run(server.url))
