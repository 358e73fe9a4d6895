"""Everything that can happen to KV events, at random, again and again: in between indexes equal caches.

    python -m tests.kv_soak --seconds 600 --seed 1

A round is a burst of prompts and some faults at the same time; then a few more prompts, quiet, and the
comparison. The seed decides the actions, not the timing of the processes' steps: a failure may need some
tries.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from dynamo_redis.errors import StoreError
from dynamo_redis.router.index import snapshotter
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.store.event_base import NewEntry
from dynamo_redis.store.keys import StreamKeys
from dynamo_redis.store.server import EmbeddedServer
from faults.proxy import STALL, Conditions, Proxy
from tests.kv_deployment import STREAM, Deployment, deployment

_WORKERS, _ROUTERS = 3, 2
_NO_ANSWERS = Conditions(swallow_answers=True)


class Soak:
    """One deployment, half of which reaches Redis through a proxy, and the faults of it."""

    def __init__(self, deployed: Deployment, server: EmbeddedServer, proxy: Proxy, prefix: str, seed: int):
        self.rng = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._deployed = deployed
        self._server = server
        self._proxy = proxy
        self._keys = StreamKeys(prefix, STREAM)
        self._faults: list[Callable[[], Awaitable[None]]] = [
            self.restart_worker,
            self.replace_worker,
            self.restart_router,
            self.reset_states,
            self.save_snapshot,
            self.lose_answers,
            self.cut_off,
            self.sleep_past_the_trim,
            self.delete_stream,
            self.delete_group,
            self.damage_entry,
            self.wipe,
            self.restart_redis,
        ]

    async def start(self) -> None:
        """Start workers and routers."""
        for number in range(_WORKERS):
            await self._deployed.worker(url=self._url(number), rank_count=1 + number % 2)
        for number in range(_ROUTERS):
            await self._deployed.router(url=self._url(number), router_snapshot_threshold=300)

    async def run(self, duration_s: float) -> None:
        """Run rounds until the time is over; at least one of each fault."""
        until = time.monotonic() + duration_s
        pending = self.rng.sample(self._faults, len(self._faults))
        while pending or time.monotonic() < until:
            for _ in range(self.rng.randrange(1, 4)):
                fault = pending.pop() if pending else self.rng.choice(self._faults)
                chatting = asyncio.create_task(self._chat())
                await fault()
                await chatting
                self.done[fault.__name__] += 1
            self._deployed.chat(self.rng.randrange(3))
            await self._deployed.wait_until_equal()
            self.done["agreed"] += 1

    def _url(self, number: int) -> str:
        return self._proxy.url if number % 2 else self._server.url

    async def _chat(self) -> None:
        for _ in range(10):
            self._deployed.chat(self.rng.randrange(4))
            await asyncio.sleep(0.002)

    # ----------------------------------------------------------------- faults

    async def restart_worker(self) -> None:
        """End a worker and start it again under its id."""
        await self._deployed.restart_worker(self.rng.choice(self._deployed.workers))

    async def replace_worker(self) -> None:
        """End a worker, and start another."""
        await self._deployed.end_worker(self.rng.choice(self._deployed.workers))
        await self._deployed.worker(url=self._url(self.rng.randrange(2)), rank_count=self.rng.randrange(1, 3))

    async def restart_router(self, *, reset: bool = False) -> None:
        """End a router and start another."""
        await self._deployed.end_router(self.rng.choice(self._deployed.indexers))
        await self._deployed.router(
            url=self._url(self.rng.randrange(2)), router_snapshot_threshold=300, router_reset_states=reset
        )

    async def reset_states(self) -> None:
        """Start a router anew, with `router_reset_states`."""
        await self.restart_router(reset=True)

    async def save_snapshot(self) -> None:
        """Let all routers store a snapshot at once; most are refused."""
        await asyncio.gather(*map(_save, self._deployed.indexers))

    async def lose_answers(self) -> None:
        """Let commands arrive and lose their answers."""
        await self._through_proxy(_NO_ANSWERS, 0.1)

    async def cut_off(self) -> None:
        """Break all connections, and refuse new ones for a moment."""
        self._proxy.refuse = True
        self._proxy.cut()
        await asyncio.sleep(0.1)
        self._proxy.heal()

    async def sleep_past_the_trim(self) -> None:
        """Stall the connections while the other workers publish more than the stream keeps."""
        flood = asyncio.create_task(self._flood())
        await self._through_proxy(STALL, 0.2)
        await flood

    async def _flood(self) -> None:
        for _ in range(20):
            self._deployed.chat(10)
            await asyncio.sleep(0.005)

    async def _through_proxy(self, conditions: Conditions, duration_s: float) -> None:
        self._proxy.conditions = conditions
        await asyncio.sleep(duration_s)
        self._proxy.heal()

    async def delete_stream(self) -> None:
        """Delete the stream, or a part of it."""
        async with self._redis() as redis:
            await redis.delete(*self._keys.all[: self.rng.randrange(1, 4)])

    async def delete_group(self) -> None:
        """Delete a router's group."""
        async with self._redis() as redis:
            router = self.rng.choice(self._deployed.indexers)
            if await redis.exists(self._keys.events):
                await redis.xgroup_destroy(self._keys.events, router.router_id)

    async def damage_entry(self) -> None:
        """Damage one stored entry."""
        streams = self.rng.choice(self._deployed.workers).runtime.events
        append = streams.append

        async def damage(stream: object, entries: list[NewEntry], **options: object) -> None:
            del streams.append
            await append(STREAM, [NewEntry(b"damaged", entry.event_count) for entry in entries])

        streams.append = damage  # type: ignore[method-assign, assignment]
        await asyncio.sleep(0.02)

    async def wipe(self) -> None:
        """Delete everything (FLUSHALL)."""
        async with self._redis() as redis:
            await redis.flushall()

    async def restart_redis(self) -> None:
        """Kill Redis and start it again, with its data or without."""
        await self._server.kill()
        if self.rng.random() < 0.5:
            self._server.erase()
        await self._server.restart()

    def _redis(self) -> Redis:
        return Redis.from_url(self._server.url)


async def _save(router: Indexer) -> None:
    with suppress(StoreError):
        await router.save_snapshot()


async def soak(server: EmbeddedServer, prefix: str, *, seed: int, duration_s: float) -> Counter[str]:
    """Run on a server of its own; return the number of times of each fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshotter, "SPACING_S", 0.0)
        return await _soak(server, prefix, seed, duration_s)


async def _soak(server: EmbeddedServer, prefix: str, seed: int, duration_s: float) -> Counter[str]:
    async with (
        Proxy(server.url) as proxy,
        deployment(
            server.url, prefix, command_timeout_s=0.5, event_stream_events_count=1000, lease_ttl_s=5.0
        ) as deployed,
    ):
        run = Soak(deployed, server, proxy, prefix, seed)
        await run.start()
        await run.run(duration_s)
        return run.done


async def _main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.kv_soak", description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=int(time.time()))
    chosen = options.parse_args()
    logging.disable(logging.CRITICAL)  # the faults would log much
    sys.stdout.write(f"seed {chosen.seed}\n")
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory), port=0) as server:
            done = await soak(server, "soak", seed=chosen.seed, duration_s=chosen.seconds)
    counts = ", ".join(f"{count} × {name.replace('_', ' ')}" for name, count in sorted(done.items()))
    most_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sys.stdout.write(f"{counts}\n{most_mib} MiB at most\n")


if __name__ == "__main__":
    asyncio.run(_main())
