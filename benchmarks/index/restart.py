"""X9: a router is killed and started again: seconds until it serves with the whole index.

A million blocks belong to 64 publishers (eight instances of eight data-parallel ranks, in a process of their
own), each of which goes on storing and evicting. One router has read them all and stored a snapshot. Half a
snapshot threshold of events later it is killed, and another is started: a new process, timed from its first
instruction on, with interpreter, imports, connections, the snapshot and the later events.

In each round the router's count of blocks is compared with the workers' own. At the end the writers stand
still, and every block is compared.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack, contextmanager
from functools import reduce
from itertools import count
from multiprocessing.connection import Connection
from operator import xor
from typing import Any

import uvloop

from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured
from dynamo_redis.config import RouterSettings
from dynamo_redis.events.kv_dump import KvDump
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.runtime import DistributedRuntime, Settings
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.wire.event import PublisherId
from dynamo_redis.wire.kv_event import DEVICE
from dynamo_redis.wire.topics import KV_DUMP, KV_EVENTS

INSTANCES = 8
RANKS = 8
BLOCKS = 1_000_000
RANK_BLOCKS = BLOCKS // (INSTANCES * RANKS)
CHAIN_BLOCKS = 16
"""Blocks of a prompt, and blocks that are evicted for it."""
TAIL_EVENTS = 50_000
"""Events between the snapshot and the kill: half of the default threshold."""
PAUSE_S = 0.1
"""Pause between two prompts of a rank, in seconds: 1,280 events and 20,000 blocks a second of all ranks
together."""

STREAM = StreamName("bench", "backend", KV_EVENTS)
_PATIENCE_S = 120.0


def restart(rounds: int) -> dict[str, Measured]:
    """Measure X9: seconds from the start of the router's process until it serves."""
    with redis_server() as server, _workers(server.url) as workers:
        _run_router(server.url, "snapshot")
        workers.send(TAIL_EVENTS)
        assert workers.recv() == "published"
        took_s = [_restarted_s(server.url, number) for number in range(rounds)]
        workers.send("stop")
        truth = workers.recv()
        if _run_router(server.url, "compare")["held"] != truth:
            raise RuntimeError("index and caches differ")
    return {"X9": Measured.alone(took_s)}


def _restarted_s(url: str, number: int) -> float:
    began_at = time.monotonic()
    served = _run_router(url, "serve")
    took_s = served["at"] - began_at
    print(f"X9 round {number + 1}: {took_s:.2f} s, {served}", flush=True)
    if abs(served["block_count"] - BLOCKS) > BLOCKS // 100:
        raise RuntimeError("the router did not come up with the whole index")
    return float(took_s)


def _run_router(url: str, task: str) -> dict[str, Any]:
    """Start a router, let it do its task, and kill it. Returns its answer."""
    command = [sys.executable, "-m", "benchmarks.index.restart", url, task]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as router:
        try:
            assert router.stdout is not None
            answer: dict[str, Any] = json.loads(router.stdout.readline())
        finally:
            router.kill()
    return answer


def _digest(blocks: Iterable[int]) -> list[int]:
    """Return the count of the blocks, and one number that stands for all of them."""
    held = list(blocks)
    return [len(held), reduce(xor, held, 0)]


# ---------------------------------------------------------------------- the router's process


async def _route(url: str, task: str) -> None:
    runtime = DistributedRuntime(settings=Settings.load(redis_url=url))
    settings = RouterSettings.load(router_snapshot_threshold=10 * BLOCKS)  # no snapshot but the requested one
    indexer = Indexer(
        runtime, STREAM.namespace, STREAM.component, settings, router_id=f"{task}-{time.time_ns()}"
    )
    await indexer.start()
    answer: dict[str, Any] = {"at": time.monotonic(), "cpu_s": round(time.process_time(), 2)}
    if task == "snapshot":
        await indexer.save_snapshot()
    elif task == "compare":
        index = indexer.index
        answer["held"] = {
            f"{worker.instance_id} {worker.dp_rank}": _digest(index.blocks_of(worker)[DEVICE])
            for worker in index.workers()
        }
    state = indexer.state()
    answer |= {name: getattr(state, name) for name in ("block_count", "events_count", "recovered_count")}
    print(json.dumps(answer), flush=True)
    await asyncio.Event().wait()


# ---------------------------------------------------------------------- the workers' process


@contextmanager
def _workers(url: str) -> Any:
    """Run the workers' process with full caches, and yield a pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, url), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "full"
        yield ours
    finally:
        process.kill()
        process.join()


def _work(pipe: Connection, url: str) -> None:
    logging.disable(logging.WARNING)
    uvloop.run(_Workers(pipe, url).run())


class _Rank:
    """One rank's cache: prompts of new blocks; the oldest is evicted first, as a whole chain."""

    def __init__(self, publisher: KvPublisher, names: count[int]) -> None:
        self._publisher = publisher
        self._names = names
        self._chains: list[list[int]] = []
        self.name_count = 0

    def chat(self) -> int:
        """Store one prompt. Returns the number of its events."""
        chain = [next(self._names) for _ in range(CHAIN_BLOCKS)]
        evicted = len(self._chains) * CHAIN_BLOCKS >= RANK_BLOCKS
        if evicted:
            self._publisher.removed(self._chains.pop(0))
        self._publisher.stored(chain, chain, None)
        self._chains.append(chain)
        return 1 + evicted

    def digest(self) -> list[int]:
        """Return the digest of the stored blocks, by the names that routers know."""
        return _digest(self._publisher.blocks())


class _Workers:
    """All instances and their ranks."""

    def __init__(self, pipe: Connection, url: str) -> None:
        self._pipe = pipe
        self._url = url
        self._ranks: dict[str, _Rank] = {}
        self._senders: list[EventPublisher] = []

    async def run(self) -> None:
        """Fill the caches, report it, and go on writing until told to stop."""
        async with AsyncExitStack() as stack:
            names = count()
            for _ in range(INSTANCES):
                settings = Settings.load(redis_url=self._url, tcp_host="127.0.0.1")
                runtime = await stack.enter_async_context(DistributedRuntime(settings=settings))
                await self._start_instance(runtime, names)
            await self._publish(BLOCKS // CHAIN_BLOCKS)
            self._pipe.send("full")
            await self._run_commands(asyncio.create_task(self._write()))

    async def _start_instance(self, runtime: DistributedRuntime, names: count[int]) -> None:
        ranks: dict[PublisherId, KvPublisher] = {}
        for number in range(RANKS):
            publisher_id = PublisherId(runtime.instance_id, secrets.randbits(62), number)
            sender = EventPublisher(runtime.events, STREAM, publisher_id, runtime.settings.events)
            await sender.start()
            self._senders.append(sender)
            ranks[publisher_id] = KvPublisher(sender, block_size=1, dp_rank=number)
            self._ranks[f"{runtime.instance_id} {number}"] = _Rank(ranks[publisher_id], names)
        endpoint = runtime.endpoint(f"{STREAM.namespace}.{STREAM.component}.{KV_DUMP}")
        await endpoint.start_serving(KvDump(ranks).generate)

    async def _run_commands(self, writer: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        while (order := await loop.run_in_executor(None, self._pipe.recv)) != "stop":
            await self._publish(order)
            self._pipe.send("published")
        writer.cancel()
        await self._flush()
        self._pipe.send({name: rank.digest() for name, rank in self._ranks.items()})
        await asyncio.sleep(_PATIENCE_S)

    async def _publish(self, event_count: int) -> None:
        """Publish `event_count` events, rank by rank, as fast as they are sent."""
        while event_count > 0:
            event_count -= sum(rank.chat() for rank in self._ranks.values())
            await self._flush()

    async def _write(self) -> None:
        while True:
            for rank in self._ranks.values():
                rank.chat()
                await asyncio.sleep(PAUSE_S / len(self._ranks))

    async def _flush(self) -> None:
        await asyncio.gather(*(sender.flush(_PATIENCE_S) for sender in self._senders))


if __name__ == "__main__":
    uvloop.run(_route(*sys.argv[1:]))
