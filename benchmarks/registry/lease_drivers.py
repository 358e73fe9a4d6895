"""Processes that keep thousands of leases alive, as as many workers would: the same script calls at the same
times, with fewer threads."""

from __future__ import annotations

import asyncio
import heapq
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import uvloop

from benchmarks.registry.population import PREFIX, key_value, leases, populate
from dynamo_redis.errors import LeaseNotFound
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.lease import RENEW_AFTER
from dynamo_redis.store.registry.scripts_api import keep_alive

DRIVERS = 4
TTL_S = 10.0
RENEW_S = TTL_S * RENEW_AFTER
SETTLE_S = RENEW_S + 1
"""Seconds after which each lease has been renewed."""
_FIRST_TTL_S = 60.0
"""TTL of the registration. Registering thousands of leases may take longer than `TTL_S`; the first renewal
sets that."""
_CONNECTIONS = 50
"""Connections of each driver. A real worker has one of its own."""


class LeaseDrivers:
    """All drivers together. Each keeps a part of the leases."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    def kill(self, count: int) -> float:
        """Stop keeping `count` leases from one moment on, and return that moment (monotonic)."""
        self._send_order(("kill", count // len(self._pipes)))
        return max(self._answers())

    def revive(self) -> None:
        """Register the killed ones again. After `SETTLE_S` they are as before."""
        self._send_order(("revive", 0))
        self._answers()

    def _send_order(self, order: tuple[str, int]) -> None:
        for pipe in self._pipes:
            pipe.send(order)

    def _answers(self) -> list[float]:
        return [pipe.recv() for pipe in self._pipes]


@contextmanager
def lease_drivers(redis_url: str, count: int) -> Iterator[LeaseDrivers]:
    """Register `count` instances, each under a lease of `TTL_S`, and keep them until the block ends.

    Each has been renewed `SETTLE_S` after the block has begun.
    """
    context = multiprocessing.get_context("spawn")
    ids = leases(count)
    pipes: list[Connection] = []
    processes = []
    try:
        for number in range(DRIVERS):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_drive, args=(theirs, redis_url, ids[number::DRIVERS]), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            pipe.recv()
        yield LeaseDrivers(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _drive(pipe: Connection, redis_url: str, ids: Sequence[LeaseId]) -> None:
    client = RedisClient(redis_url, timeout_s=3, client_name="lease driver")
    keys = RegistryKeys(PREFIX)
    connections = [client.sync(3) for _ in range(_CONNECTIONS)]
    incarnation = uvloop.run(_incarnation(redis_url))
    uvloop.run(populate(redis_url, ids, _FIRST_TTL_S))
    due = _schedule(ids)
    dead: list[LeaseId] = []
    pipe.send(time.monotonic())
    while True:
        wait_s = max(0.0, due[0][0] - time.monotonic())
        if pipe.poll(wait_s):
            order, count = pipe.recv()
            if order == "kill":
                random.shuffle(due)
                dead, due = [lease for _, lease in due[:count]], due[count:]
                heapq.heapify(due)
            else:
                uvloop.run(populate(redis_url, dead, _FIRST_TTL_S))
                for entry in _schedule(dead):
                    heapq.heappush(due, entry)
            pipe.send(time.monotonic())
            continue
        due_at, lease = due[0]
        sent_at = time.monotonic()
        try:
            keep_alive(connections[lease % _CONNECTIONS], keys, incarnation, lease, TTL_S)
        except LeaseNotFound as exc:
            raise RuntimeError(
                f"the machine is too busy: a renewal came {sent_at - due_at:.1f} s late"
            ) from exc
        heapq.heapreplace(due, (sent_at + RENEW_S, lease))


def _schedule(ids: Sequence[LeaseId]) -> list[tuple[float, LeaseId]]:
    """Return the time of each lease's first renewal: workers do not start together."""
    now = time.monotonic()
    due = [(now + random.uniform(0, RENEW_S), lease) for lease in ids]
    heapq.heapify(due)
    return due


async def _incarnation(redis_url: str) -> str:
    client = RedisClient(redis_url, timeout_s=3, client_name="lease driver")
    try:
        return (await key_value(client).initialize()).incarnation
    finally:
        await client.aclose()


class Ticker:
    """The ticks of a whole deployment, 16 a second, from one task."""

    def __init__(self, client: RedisClient, ticks_per_s: float = 16.0) -> None:
        self._kv = key_value(client)
        self._interval_s = 1 / ticks_per_s
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(0.75, 1.25))
            while (await self._kv.tick()).overdue_count:
                pass

    async def aclose(self) -> None:
        """Stop ticking. Raises the error of a tick."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()
