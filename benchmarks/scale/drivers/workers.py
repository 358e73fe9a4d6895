"""A process with many workers, each with a runtime, a lease and publishers of its own, as the product runs
them: `python -m benchmarks.scale.drivers.workers FIRST COUNT light|usual`. Only their engines are simulated.

`light`: their events go through a `LightClient`. It prints `ready`, and answers each line:

    start         `started`, once all of its workers are registered
    chats RATE    `running`: chats begin at RATE a second, evenly spread over the workers
    rest          `resting`: no new chats; those under way end at once
    timed         from now on the time of each published block is kept
    counts        JSON: chats, events, events left out or waiting, blocks, the latest start of a chat (s), CPU (s),
                  and with `timed` the times in ns by block
"""

from __future__ import annotations

import asyncio
import heapq
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import uvloop

from benchmarks.scale.engine import BLOCK_S, Chat, SimulatedEngine
from benchmarks.scale.light_client import LightClient
from dynamo_redis.config import EventSettings, ModelSettings
from dynamo_redis.engines.worker import open_model, serve_engine
from dynamo_redis.runtime.runtime import DistributedRuntime, Settings
from dynamo_redis.store.connect import open_whole_store
from dynamo_redis.store.event_base import EventStreams
from dynamo_redis.store.streams.redis_streams import RedisEventStreams

ENDPOINT = "dynamo.backend.generate"
TURN_S = 0.004
STARTS_AT_ONCE = 4
"""Of the workers of one process, whose starts share its one thread: each alone takes some 20 ms of it."""


def open_runtime(*, is_light: bool) -> DistributedRuntime:
    """Return the runtime of one simulated process, by the environment's settings."""
    settings = Settings.load()
    registry, objects, locks, events = open_whole_store(settings.store, settings.events)
    chosen: EventStreams = light_events(settings) if is_light else events
    return DistributedRuntime(
        settings=settings, registry=registry, objects=objects, locks=locks, events=chosen
    )


def light_events(settings: Settings) -> RedisEventStreams:
    """Return event streams on a client of their own, a light one."""
    url, timeout_s = settings.store.require_url(), settings.store.command_timeout_s
    return RedisEventStreams(LightClient(url, timeout_s=timeout_s), settings.store.prefix, settings.events)


class Load:
    """Chats of all engines, on a schedule."""

    def __init__(self, engines: Sequence[SimulatedEngine]) -> None:
        self._engines = engines
        self._due: list[tuple[float, int, SimulatedEngine, Chat | None]] = []
        self._number = 0
        self._rate = 0.0
        self._next_at = 0.0
        self.chat_count = 0
        self.late_s = 0.0
        self.published: dict[int, int] | None = None
        """The time of each block, in ns, once it is wanted."""

    def set_rate(self, rate: float) -> None:
        """Begin `rate` chats a second from now on; 0: none, and those under way end."""
        self._rate, self._next_at, self.late_s = rate, time.monotonic(), 0.0
        if not rate:
            for _, _, engine, chat in self._due:
                while chat is not None and engine.go_on(chat):
                    pass
            self._due.clear()

    async def run(self) -> None:
        """Begin and continue chats when they are due. Runs until cancelled."""
        while True:
            now = time.monotonic()
            while self._rate and self._next_at <= now:
                self.late_s = max(self.late_s, now - self._next_at)
                engine = self._engines[self.chat_count % len(self._engines)]
                self.chat_count += 1
                chat = engine.begin()
                self._note(engine)
                # The first block of the answer comes at a time of its own: steps of engines are not in step.
                self._push(now + BLOCK_S * (self.chat_count % 97) / 97, engine, chat)
                self._next_at += 1 / self._rate
            while self._due and self._due[0][0] <= now:
                at, _, engine, due = heapq.heappop(self._due)
                assert due is not None
                if engine.go_on(due):
                    self._push(at + BLOCK_S, engine, due)
                self._note(engine)
            await asyncio.sleep(TURN_S)

    def _push(self, at: float, engine: SimulatedEngine, chat: Chat) -> None:
        self._number += 1
        heapq.heappush(self._due, (at, self._number, engine, chat))

    def _note(self, engine: SimulatedEngine) -> None:
        if self.published is not None and (events := engine.rank.events_from(engine.rank.next_sequence - 1)):
            self.published[events[0].hashes[-1]] = time.monotonic_ns()


async def main(first: int, count: int, *, is_light: bool) -> None:
    """Answer the suite's lines until the input ends."""
    engines = [SimulatedEngine(number + 1) for number in range(first, first + count)]
    model, name = open_model(ModelSettings.load())
    load = Load(engines)
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        runtimes = [open_runtime(is_light=is_light) for _ in engines]
        print("ready", flush=True)
        tasks: list[asyncio.Task[None]] = []
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            word, *values = line.split()
            match word:
                case "start":
                    starting = asyncio.Semaphore(STARTS_AT_ONCE)

                    async def start(runtime: DistributedRuntime, engine: SimulatedEngine) -> None:
                        async with starting:
                            ready = asyncio.Event()
                            serving = serve_engine(
                                runtime,
                                engine,
                                model,
                                endpoint=ENDPOINT,
                                model_name=name,
                                on_ready=lambda _: ready.set(),
                            )
                            tasks.append(group.create_task(serving))
                            await ready.wait()

                    await asyncio.gather(*map(start, runtimes, engines))
                    tasks.append(group.create_task(load.run()))
                    print("started", flush=True)
                case "chats":
                    load.set_rate(float(values[0]))
                    print("running", flush=True)
                case "rest":
                    load.set_rate(0)
                    print("resting", flush=True)
                case "timed":
                    load.published = {}
                    print("timed", flush=True)
                case "counts":
                    print(json.dumps(counts(load, engines)), flush=True)
        for task in tasks:
            task.cancel()


def counts(load: Load, engines: Sequence[SimulatedEngine]) -> dict[str, object]:
    """Return what this process has done so far."""
    return {
        "chats": load.chat_count,
        "events": sum(engine.rank.next_sequence for engine in engines),
        "blocks": sum(engine.rank.block_count for engine in engines),
        "late_s": load.late_s,
        "cpu_s": time.process_time(),
        "published": load.published,
    }


if __name__ == "__main__":
    EventSettings.load()
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), is_light=sys.argv[3] == "light"))
