"""S4 and S5: the cost of a chat for Redis, against the cost of one SET and one GET.

A deployment as `up` starts it, on defaults: a frontend and two mock workers at their own speed. Chats of 100
words, each another prompt, come at a fixed pace, whether or not the last ones have been answered. The figure
is all CPU time that Redis used meanwhile, by INFO, for the chats and for the deployment's keepalives, ticks
and reads; less the time that another server, set up alike and without work, used in the same seconds. That
server then serves one client that sends a SET and a GET in turn, each when the last one is answered.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from benchmarks.harness.chats import Chatter, first_model
from benchmarks.harness.processes import redis_server, up
from benchmarks.harness.report import Measured
from dynamo_redis.store.redis.client import RedisClient

CHATS_PER_S: Final = 300
ROUND_S: Final = 5.0
WORDS: Final = 100
PAIRS: Final = 3000
MOST_AT_ONCE: Final = 512
SETTLE_S: Final = 12.0
"""Seconds until the deployment is settled: a publisher without readers sends for some seconds after its
start."""
WARM_S: Final = 2.0
VALUE: Final = b"x" * 100

_CPU: Final = re.compile(rb"used_cpu_(?:user|sys)(_main_thread)?:([0-9.]+)")


def prompt(seed: int) -> str:
    """Return a hundred words with which no other chat begins."""
    rng = random.Random(seed)
    return " ".join(f"word{rng.randrange(10_000)}" for _ in range(WORDS))


async def cpu_s(redis: RedisClient) -> float:
    """Return the CPU time of Redis in seconds; that of its main thread where INFO has it."""
    found = _CPU.findall(await redis.execute("INFO", "cpu"))
    chosen = [value for thread, value in found if thread] or [value for _, value in found]
    return sum(map(float, chosen))


async def paced(count: int, per_s: float, call: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    """Call `count` times, each when it is due, however long the others take. Raises the error of a call."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as calls:
        for number in range(count):
            await asyncio.sleep(began + number / per_s - time.perf_counter())
            calls.create_task(call(number))


class Chats:
    """Chats over kept connections to one frontend."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._idle: list[Chatter] = []
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        self._seed = 0

    async def one(self, _: int) -> None:
        """Send one chat with a new prompt."""
        self._seed += 1
        async with self._places:
            chatter = self._idle.pop() if self._idle else await Chatter.open(self._url)
            await chatter.chat(self._model, prompt(self._seed))
            self._idle.append(chatter)

    def close(self) -> None:
        """Close all connections."""
        for chatter in self._idle:
            chatter.close()


async def _measure(redis_url: str, chats_url: str, alone_url: str, rounds: int, row: str) -> Measured:
    """Measure a row. `redis_url` is the deployment's Redis, `chats_url` its frontend, `alone_url` the server
    without work."""
    redis = RedisClient(redis_url, timeout_s=30, client_name="bench")
    alone = RedisClient(alone_url, timeout_s=30, client_name="bench")
    chats = Chats(chats_url, await asyncio.to_thread(first_model, chats_url, 30))

    async def set_and_get() -> None:
        for number in range(PAIRS):
            await alone.execute("SET", f"key{number}", VALUE)
            await alone.execute("GET", f"key{number}")

    await asyncio.sleep(SETTLE_S)
    await paced(round(WARM_S * CHATS_PER_S), CHATS_PER_S, chats.one)
    count = round(ROUND_S * CHATS_PER_S)
    ours: list[float] = []
    rivals: list[float] = []
    for number in range(rounds):
        before, idle, began = await cpu_s(redis), await cpu_s(alone), time.perf_counter()
        await paced(count, CHATS_PER_S, chats.one)
        took_s = time.perf_counter() - began
        ours.append(1e6 * (await cpu_s(redis) - before - (await cpu_s(alone) - idle)) / count)
        before = await cpu_s(alone)
        await set_and_get()
        rivals.append(1e6 * (await cpu_s(alone) - before) / PAIRS)
        print(
            f"{row} round {number + 1}: {ours[-1]:.1f} µs a chat at {count / took_s:.0f}/s,"
            f" {rivals[-1]:.1f} µs a SET and a GET",
            flush=True,
        )
    chats.close()
    for client in (redis, alone):
        await client.aclose()
    return Measured.against(ours, rivals)


def redis_cost(row: str, *options: str) -> Callable[[int], dict[str, Measured]]:
    """Return the measurement of a row with these options of `up`: µs, and their ratio."""

    def measure(rounds: int) -> dict[str, Measured]:
        with (
            redis_server() as server,
            redis_server() as other,
            up("--redis-url", server.url, "--redis-prefix", "bench-cost", *options) as url,
        ):
            return {row: asyncio.run(_measure(server.url, url, other.url, rounds, row))}

    return measure
