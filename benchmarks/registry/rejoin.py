"""R7: 10,000 workers register again after their whole registry was wiped (FLUSHALL).

Four processes hold 2,500 of the product's `Registrations` each, each with a lease and a writer chain of its
own, over one client and one log reader a process. The shared log reader stands for the log reader of each
worker: after the jitter of 10,000 processes it disturbs each, and passes each entry of the log to the workers
that it concerns. There are no keepalives, which would find the wipe sooner than the log reader's next look (2
s). The drivers run at a lower priority than the server: in a deployment their work is done by other machines.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import redis
import uvloop

from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured
from benchmarks.registry.population import INSTANCES, PREFIX, key_of, key_value, leases, record_of
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.health import Health
from dynamo_redis.store.registry.change_log import Change
from dynamo_redis.store.registry.lease import WriterChain
from dynamo_redis.store.registry.log_reader import LogReader, spread_s
from dynamo_redis.store.registry.registrations import Registrations

PROCESSES = 4
NICENESS = 10
LONG_TTL_S = 3600.0
"""TTL of leases without keepalives, in seconds."""
PATIENCE_S = 60.0
SETTLE_S = 1.0
POLL_S = 0.02
SLOW_US = 500


def rejoin(rounds: int) -> dict[str, Measured]:
    """Measure R7: s until all keys are back, and ms of the longest script meanwhile."""
    complete_s: list[float] = []
    longest_ms: list[float] = []
    with redis_server() as server, redis.Redis.from_url(server.url, protocol=2) as client:
        client.config_set("slowlog-log-slower-than", SLOW_US)
        client.config_set("slowlog-max-len", 100_000)
        ids = leases()
        processes = [_start(server.url, ids[number::PROCESSES]) for number in range(PROCESSES)]
        try:
            for _, pipe in processes:
                pipe.recv()
            for number in range(rounds):
                time.sleep(SETTLE_S)
                complete_s.append(_wipe(client))
                longest_ms.append(_longest_script_ms(client))
                print(
                    f"R7 round {number + 1}: complete after {complete_s[-1]:.2f} s, "
                    f"longest script {longest_ms[-1]:.1f} ms",
                    flush=True,
                )
        finally:
            for process, _ in processes:
                process.kill()
                process.join()
    return {"R7": Measured.alone(complete_s, longest_ms)}


def _wipe(client: Any) -> float:
    """Wipe the server, and return the seconds until every worker's key is there again."""
    client.execute_command("SLOWLOG", "RESET")
    began = time.monotonic()
    client.flushall()
    index = RegistryKeys(PREFIX).structure("idx")
    while time.monotonic() - began < PATIENCE_S:
        if client.execute_command("ZLEXCOUNT", index, "[v1/", "(v1/\xff") == INSTANCES:
            return time.monotonic() - began
        time.sleep(POLL_S)
    raise RuntimeError(f"not all workers were back after {PATIENCE_S:.0f} s")


def _longest_script_ms(client: Any) -> float:
    """Return the longest script of the server's slow log, which counts the time inside the server."""
    entries: list[dict[str, Any]] = client.slowlog_get(100_000)
    scripts = [entry["duration"] for entry in entries if entry["command"].startswith(b"EVAL")]
    return max(scripts, default=SLOW_US) / 1e3


# ---------------------------------------------------------------------- the workers


def _start(redis_url: str, ids: Sequence[LeaseId]) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, redis_url, ids), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(pipe: Connection, redis_url: str, ids: Sequence[LeaseId]) -> None:
    os.nice(NICENESS)
    logging.disable(logging.WARNING)  # each of the workers would log the loss of its lease
    uvloop.run(Workers(redis_url, ids).run(pipe))


class Workers:
    """Many workers' registrations in one process."""

    def __init__(self, redis_url: str, ids: Sequence[LeaseId]) -> None:
        self._client = RedisClient(redis_url, timeout_s=10, client_name="workers")
        self._kv = key_value(self._client)
        self._reader = LogReader(
            self._kv,
            Health(self._client.address),
            on_changes=self._on_changes,
            on_disturbance=self._on_disturbance,
        )
        self._by_lease = {lease: self._registrations(lease) for lease in ids}
        self._by_key = {key_of(lease): self._by_lease[lease] for lease in ids}

    def _registrations(self, lease: LeaseId) -> Registrations:
        return Registrations(
            self._kv,
            lease,
            LONG_TTL_S,
            WriterChain(),
            on_grant=lambda _incarnation, _sent_at: None,
            spread_s=lambda: spread_s(INSTANCES),
        )

    async def run(self, pipe: Connection) -> None:
        """Register, report it, and run until the process is ended."""
        position = await self._kv.initialize()
        self._reader.start(position)
        for lease, registrations in self._by_lease.items():
            registrations.start(position.incarnation)
            await registrations.register(
                key_of(lease),
                record_of(lease),
                exclusive=False,
                stalled_value=None,
                prepare=None,
                on_lost=None,
            )
        pipe.send("ready")
        await asyncio.Event().wait()

    def _on_changes(self, changes: Sequence[Change]) -> None:
        for change in changes:
            concerned = self._by_key.get(change.key) or self._by_lease.get(change.lease or LeaseId(0))
            if concerned is not None:
                concerned.note([change])

    def _on_disturbance(self, reason: str) -> None:
        loop = asyncio.get_running_loop()
        for registrations in self._by_lease.values():
            loop.call_later(spread_s(INSTANCES), registrations.disturb, reason)
