"""F13: the CPU time of a frontend while three browsers look at its dashboard, with 1,000 workers.

Two workers are processes, the others are records only, and there are no requests. Twenty of the records
change their state each second, so that there is something to send. The browsers are three readers of the
stream: they read as fast as it comes, and draw nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Final

import psutil
import uvloop

from benchmarks.frontend.copies import Copies
from benchmarks.frontend.prompts import model_directory
from benchmarks.frontend.sides import (
    STEP_APART,
    WORKERS,
    Side,
    await_instances,
    our_frontend,
    our_workers,
    tree_cpu_s,
)
from benchmarks.harness.report import Measured
from dynamo_redis.runtime import DistributedRuntime, Settings

INSTANCES: Final = 1000
BROWSERS: Final = 3
CHANGES: Final = 20
"""Records that change each second."""
ROUND_S: Final = 10.0
SETTLE_S: Final = 3.0
_LEAST_FRAMES: Final = int(0.6 * ROUND_S)
_READ_BYTES: Final = 1 << 20


def dashboard(rounds: int) -> dict[str, Measured]:
    """Measure F13, in % of a core. The time without browsers, in turns, is printed."""
    with ExitStack() as stack:
        model = stack.enter_context(model_directory())
        workers = stack.enter_context(our_workers(model, "--speedup-ratio", STEP_APART))
        side = stack.enter_context(our_frontend(workers, "--router-mode", "kv"))
        looked, alone = uvloop.run(_measure(side, workers.environment, rounds))
    print(f"F13 without a browser: {Measured.alone(alone).ours:g} %", flush=True)
    return {"F13": Measured.alone(looked)}


async def _measure(side: Side, environment: dict[str, str], rounds: int) -> tuple[list[float], list[float]]:
    """Return the shares of a core with the browsers and without them, in %."""
    settings = Settings.load(redis_url=environment["DYN_REDIS_URL"], prefix=environment["DYN_REDIS_PREFIX"])
    looked, alone = [], []
    async with DistributedRuntime(settings=settings) as runtime:
        copies = await Copies.of_a_worker(runtime.registry)
        await copies.put(INSTANCES - WORKERS)
        await asyncio.to_thread(await_instances, side, INSTANCES)
        changing = asyncio.create_task(_change(copies))
        try:
            for number in range(rounds):
                await asyncio.sleep(SETTLE_S)
                alone.append(await _share(side, lambda: asyncio.sleep(ROUND_S)))
                async with _browsers(side) as look:
                    looked.append(await _share(side, look))
                print(
                    f"F13 round {number + 1}: {looked[-1]:.2f} %, without a browser {alone[-1]:.2f} %",
                    flush=True,
                )
        finally:
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
    return looked, alone


async def _change(copies: Copies) -> None:
    """Have some records say that they are not ready, each for a second."""
    first = 0
    while True:
        began_at = time.monotonic()
        changed = [(first + place) % (INSTANCES - WORKERS) for place in range(CHANGES)]
        await asyncio.gather(
            *(copies.put_record(number, is_ready=False) for number in changed[: CHANGES // 2])
        )
        await asyncio.gather(
            *(copies.put_record(number, is_ready=True) for number in changed[CHANGES // 2 :])
        )
        first = (first - CHANGES // 2) % (INSTANCES - WORKERS)
        await asyncio.sleep(max(1.0 - (time.monotonic() - began_at), 0.0))


async def _share(side: Side, work: Callable[[], Awaitable[None]]) -> float:
    """Return the CPU time of the frontend during some work, in % of a core."""
    processes = [psutil.Process(pid) for pid in side.pids("frontend")]
    began_at, before = time.monotonic(), sum(map(tree_cpu_s, processes))
    await work()
    return 100 * (sum(map(tree_cpu_s, processes)) - before) / (time.monotonic() - began_at)


@asynccontextmanager
async def _browsers(side: Side) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Open the streams, and yield a function that reads them for a round. Raises RuntimeError if they do not
    bring a state of all instances, and then changes."""
    streams = [
        await asyncio.open_connection("127.0.0.1", side.port, limit=_READ_BYTES) for _ in range(BROWSERS)
    ]
    for reader, writer in streams:
        writer.write(b"GET /dashboard/events HTTP/1.1\r\nHost: bench\r\n\r\n")
        await reader.readuntil(b"event: state\ndata: ")
        state = json.loads(await reader.readuntil(b"\n"))
        if len(state["who"]) != INSTANCES:
            raise RuntimeError(f"the dashboard shows {len(state['who'])} instances, not {INSTANCES}")

    async def look() -> None:
        counts = await asyncio.gather(*(_count_frames(reader) for reader, _ in streams))
        if min(counts) < _LEAST_FRAMES:
            raise RuntimeError(f"the browsers got {counts} frames in {ROUND_S:g} s")

    try:
        yield look
    finally:
        for _, writer in streams:
            writer.close()


async def _count_frames(reader: asyncio.StreamReader) -> int:
    """Read a stream for a round; return the number of its frames."""
    count = 0
    try:
        async with asyncio.timeout(ROUND_S):
            while content := await reader.read(_READ_BYTES):
                count += content.count(b"event: change\n")
    except TimeoutError:
        return count
    raise RuntimeError("the frontend ended a stream of the dashboard")
