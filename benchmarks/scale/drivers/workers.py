"""A process with many workers: `python -m benchmarks.scale.drivers.workers FIRST COUNT TOTAL KIND`.

KIND is `usual` for workers as the product runs them, each with a runtime, a lease and publishers of its own;
only their engines are simulated. Of `light` workers the events go through a `LightClient`. `bare` workers are
publishers of KV events and of load with a `LightClient` each, and nothing else.

It prints `ready`, and answers each line:

    start         `started`, once all of its workers are registered
    chats RATE    `running`: chats begin at RATE a second, evenly spread over the workers
    rest          `resting`: no new chats; those under way end at once
    burst N       `done`: N chats of each worker, all at once
    timed         from now on the time of each published block is kept
    counts        JSON: chats, events, blocks, the latest start of a chat (s), CPU (s), and with `timed` the
                  times in ns by block
"""

from __future__ import annotations

import asyncio
import heapq
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence

import uvloop

from benchmarks.scale.engine import BLOCK_S, BLOCK_TOKENS, Chat, SimulatedEngine
from benchmarks.scale.light_client import LightClient
from dynamo_redis.config import ModelSettings
from dynamo_redis.engines.load_reports import report_load
from dynamo_redis.engines.worker import open_model, serve_engine
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.events.load_publisher import LoadPublisher
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.events.shards import kv_event_streams, shard_of
from dynamo_redis.events.worker_events import LEAST_TRIPS_PER_S, TRIPS_PER_S
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime.runtime import DistributedRuntime, Settings
from dynamo_redis.store.connect import open_whole_store
from dynamo_redis.store.event_base import EventStreams
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from dynamo_redis.wire.event import PublisherId

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
    if url.startswith("redis+cluster://"):  # there is no light client of several servers
        return RedisEventStreams.from_settings(settings.store, settings.events)
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

    def burst(self, count: int) -> None:
        """Run `count` chats of each engine from their beginning to their end."""
        for engine in self._engines:
            for _ in range(count):
                chat = engine.begin()
                while engine.go_on(chat):
                    pass

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


class Workers:
    """The workers of the product, with simulated engines."""

    def __init__(self, engines: Sequence[SimulatedEngine], *, is_light: bool) -> None:
        self._engines = engines
        self._runtimes = [open_runtime(is_light=is_light) for _ in engines]
        self._model, self._name = open_model(ModelSettings.load())

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Start all workers in tasks of the group; return when they are registered."""
        starting = asyncio.Semaphore(STARTS_AT_ONCE)

        async def start(runtime: DistributedRuntime, engine: SimulatedEngine) -> None:
            ready = asyncio.Event()

            def note_ready(_: str) -> None:
                ready.set()

            async with starting:
                serving = serve_engine(
                    runtime,
                    engine,
                    self._model,
                    endpoint=ENDPOINT,
                    model_name=self._name,
                    on_ready=note_ready,
                )
                group.create_task(serving)
                await ready.wait()

        await asyncio.gather(*map(start, self._runtimes, self._engines))


class BareWorkers:
    """Publishers of simulated engines' events, at the pace of one of `total` workers."""

    def __init__(self, first: int, engines: Sequence[SimulatedEngine], total: int) -> None:
        self._first = first
        self._engines = engines
        self._total = total

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Start all publishers: of KV events and of load."""
        settings = Settings.load()
        endpoint = EndpointName.parse(ENDPOINT)
        shards = kv_event_streams(endpoint.namespace, endpoint.component, settings.events)
        share_per_s = max(TRIPS_PER_S / self._total, LEAST_TRIPS_PER_S)
        for number, engine in enumerate(self._engines, self._first + 1):
            publisher_id = PublisherId(number, secrets.randbits(62), 0)
            streams = light_events(settings)
            publisher = EventPublisher(
                streams,
                shards[shard_of(publisher_id, len(shards))],
                publisher_id,
                settings.events,
                trips_per_s=lambda: share_per_s,
            )
            engine.follow([KvPublisher(publisher, block_size=BLOCK_TOKENS)])
            await publisher.start()
            load = LoadPublisher(streams, endpoint.namespace, endpoint.component, number)
            load.start()
            group.create_task(report_load(engine, load))


async def main(first: int, count: int, total: int, kind: str) -> None:
    """Answer the suite's lines until the input ends."""
    engines = [SimulatedEngine(number + 1) for number in range(first, first + count)]
    load = Load(engines)
    workers = (
        BareWorkers(first, engines, total) if kind == "bare" else Workers(engines, is_light=kind == "light")
    )
    async with asyncio.TaskGroup() as group:
        print("ready", flush=True)
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            word, *values = line.split()
            match word:
                case "start":
                    await workers.start(group)
                    group.create_task(load.run())
                    print("started", flush=True)
                case "chats":
                    load.set_rate(float(values[0]))
                    print("running", flush=True)
                case "rest":
                    load.set_rate(0)
                    print("resting", flush=True)
                case "burst":
                    load.burst(int(values[0]))
                    print("done", flush=True)
                case "timed":
                    load.published = {}
                    print("timed", flush=True)
                case "counts":
                    print(json.dumps(counts(load, engines)), flush=True)
        os._exit(0)  # the publishers of a thousand workers have nothing left to say


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
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
