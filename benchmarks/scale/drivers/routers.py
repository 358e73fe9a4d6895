"""A process with routers of the simulated workers: `python -m benchmarks.scale.drivers.routers COUNT KIND`.

KIND is `timed` for routers as they are, or `deaf` for routers that send and receive all that routers do, and
apply nothing of it: so that one machine carries several. Events of deaf ones go through a `LightClient`.

It prints `ready`, and answers each line:

    start N       `started`, once all of its routers list N workers
    chats RATE    `running`: each router books RATE chats a second
    timed         from now on the time is kept at which each block came into the index
    counts        JSON: chats, blocks in the index, events applied, gaps, CPU (s), times of choices (µs: p50,
                  p99), and with `timed` the times in ns by block
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import uvloop

from benchmarks.scale.drivers.workers import ENDPOINT, TURN_S, open_runtime
from benchmarks.scale.engine import ANSWER_TOKENS, BLOCK_TOKENS, PROMPT_BLOCKS, TOKENS_PER_S
from dynamo_redis.config import RouterSettings
from dynamo_redis.names import EndpointName
from dynamo_redis.router import kv_router
from dynamo_redis.router.base import Matched, Worker, WorkerChoice
from dynamo_redis.router.choice.booking import Booking
from dynamo_redis.router.choice.booking_sync import BookingSync
from dynamo_redis.router.choice.load_metrics import LoadMetrics
from dynamo_redis.router.index import indexer
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.store.event_base import Entry
from dynamo_redis.wire.kv_event import KvEvent

ANSWER_S = ANSWER_TOKENS / TOKENS_PER_S
PREFILL_S = 0.2
BOOKED_S = 60.0
POLL_S = 0.02
CHOICES_KEPT = 20_000
MOST_LATE_S = 0.1

_SEEN: dict[int, int] = {}
_SYNCS: list[BookingSync] = []


class TimedIndex(KvIndex):
    """An index that notes the time at which each block comes, once that is wanted."""

    wanted = False

    def apply(self, worker: Worker, events: Sequence[KvEvent]) -> None:
        super().apply(worker, events)
        if TimedIndex.wanted:
            now = time.monotonic_ns()
            for event in events:
                _SEEN.update(dict.fromkeys(event.hashes, now))


class DeafIndexer(Indexer):
    """An indexer that reads all events, and applies none."""

    def apply(self, content: bytes) -> int:
        del content
        return 1


class DeafSync(BookingSync):
    """A sync that reads other routers' bookings, and books none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _SYNCS.append(self)

    def apply(self, entry: Entry, *, age_s: float = 0.0) -> None:
        if not self.has_read:  # the first entry tells it of other routers
            super().apply(entry, age_s=age_s)
            self.has_read = True

    has_read = False


class DeafMetrics(LoadMetrics):
    """A reader of load that notes none."""

    def apply(self, message: bytes) -> None:
        del message


Begin = Callable[[], Awaitable[Callable[[], None]]]
"""Begins a chat, and returns the function that ends it."""


class Chats:
    """Chats of one router on a schedule, each booked for as long as its answer takes."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._rate = 0.0
        self._next_at = 0.0
        self.count = 0
        self.late_s = 0.0
        self.took_s: list[float] = []

    def set_rate(self, rate: float) -> None:
        """Begin `rate` chats a second from now on."""
        self._rate, self._next_at, self.late_s, self.took_s = rate, time.monotonic(), 0.0, []

    async def run(self) -> None:
        """Begin and end chats when they are due. Runs until cancelled."""
        due: list[tuple[float, int, Callable[[], None]]] = []
        while True:
            now = time.monotonic()
            if self._rate and now - self._next_at > MOST_LATE_S:  # this machine is at its end: no chat waits
                self._next_at = now
            while self._rate and self._next_at <= now:
                self.late_s = max(self.late_s, now - self._next_at)
                began = time.perf_counter()
                end = await self._begin()
                if len(self.took_s) < CHOICES_KEPT:
                    self.took_s.append(time.perf_counter() - began)
                self.count += 1
                heapq.heappush(due, (now + ANSWER_S, self.count, end))
                self._next_at += 1 / self._rate
            while due and due[0][0] <= now:
                heapq.heappop(due)[2]()
            await asyncio.sleep(TURN_S)


def timed_chats(router: KvRouter, number: int) -> Begin:
    """Return a beginner of chats that the router chooses workers for."""
    rng = random.Random(number)
    shared = [rng.choices(range(1 << 17), k=BLOCK_TOKENS * PROMPT_BLOCKS * 3 // 8) for _ in range(64)]
    rest = len(shared[0])
    ending: set[asyncio.Future[bool | None]] = set()

    async def begin() -> Callable[[], None]:
        own = rng.choices(range(1 << 17), k=BLOCK_TOKENS * PROMPT_BLOCKS - rest)
        reservation = router.reserve({"token_ids": rng.choice(shared) + own})
        await reservation.__aenter__()

        def end() -> None:
            ending.add(task := asyncio.ensure_future(reservation.__aexit__(None, None, None)))
            task.add_done_callback(ending.discard)

        return end

    return begin


def deaf_chats(sync: BookingSync, worker_ids: Sequence[int], number: int) -> Begin:
    """Return a beginner of chats that are only booked, at any workers."""
    rng, ids = random.Random(number), itertools.count()

    async def begin() -> Callable[[], None]:
        request_id = f"{next(ids):x}"
        choice = WorkerChoice(Worker(rng.choice(worker_ids), 0), Matched(0), 0.0)
        deadline = time.monotonic() + BOOKED_S
        names = rng.randbytes(8 * PROMPT_BLOCKS)
        tokens = BLOCK_TOKENS * PROMPT_BLOCKS
        sync.added(Booking(request_id, choice, tokens, PROMPT_BLOCKS, deadline, names))
        asyncio.get_running_loop().call_later(PREFILL_S, sync.prefill_done, request_id)
        return lambda: sync.freed(request_id)

    return begin


async def schedules(routers: Sequence[KvRouter], listed_count: int, *, is_deaf: bool) -> list[Chats]:
    """Wait until all routers list so many workers, and return a schedule for each."""
    while any(len(router.instance_ids()) < listed_count for router in routers):
        await asyncio.sleep(POLL_S)
    if not is_deaf:
        return [Chats(timed_chats(router, number)) for number, router in enumerate(routers)]
    worker_ids = routers[0].instance_ids() or range(1, 1001)
    return [Chats(deaf_chats(sync, worker_ids, number)) for number, sync in enumerate(_SYNCS)]


async def main(count: int, kind: str) -> None:
    """Answer the suite's lines until the input ends."""
    is_deaf = kind == "deaf"
    if is_deaf:
        vars(kv_router).update(Indexer=DeafIndexer, BookingSync=DeafSync, LoadMetrics=DeafMetrics)
    else:
        vars(indexer)["KvIndex"] = TimedIndex
    endpoint = EndpointName.parse(ENDPOINT)
    async with AsyncExitStack() as stack:
        routers: list[KvRouter] = []
        for _ in range(count):
            runtime = await stack.enter_async_context(open_runtime(is_light=is_deaf))
            router = KvRouter(runtime, endpoint, RouterSettings.load(), block_size=BLOCK_TOKENS)
            routers.append(await stack.enter_async_context(router))
            if is_deaf:  # by default no router listens to load; of those that only count for Redis all do
                await router.count_load()
        group = await stack.enter_async_context(asyncio.TaskGroup())
        chats: list[Chats] = []
        tasks: list[asyncio.Task[None]] = []
        print("ready", flush=True)
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            word, *values = line.split()
            match word:
                case "start":
                    chats += await schedules(routers, int(values[0]), is_deaf=is_deaf)
                    tasks += [group.create_task(one.run()) for one in chats]
                    print("started", flush=True)
                case "chats":
                    for one in chats:
                        one.set_rate(float(values[0]))
                    print("running", flush=True)
                case "timed":
                    TimedIndex.wanted = True
                    _SEEN.clear()
                    print("timed", flush=True)
                case "counts":
                    print(json.dumps(counts(routers, chats)), flush=True)
        for task in tasks:
            task.cancel()


def counts(routers: Sequence[KvRouter], chats: Sequence[Chats]) -> dict[str, object]:
    """Return what this process has done so far."""
    states = [router.indexer.state() for router in routers if router.indexer is not None]
    took_us = sorted(1e6 * took_s for one in chats for took_s in one.took_s) or [0.0]
    return {
        "chats": sum(one.count for one in chats),
        "late_s": max((one.late_s for one in chats), default=0.0),
        "blocks": sum(state.block_count for state in states),
        "events": sum(state.events_count for state in states),
        "gaps": sum(state.gaps_count for state in states),
        "cpu_s": time.process_time(),
        "choice_us": [statistics.median(took_us), took_us[len(took_us) * 99 // 100]],
        "seen": _SEEN,
    }


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
