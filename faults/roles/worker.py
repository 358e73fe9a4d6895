"""A process that registers keys under its lease, changes them and gives some of them up, as a worker does.

The runner kills it, freezes it beyond its TTL, or makes it hang its event loop (SIGUSR2).
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any, Final

from dynamo_redis.errors import KeyExists, LeaseNotFound
from dynamo_redis.names import format_instance_id
from dynamo_redis.store.base import LostReason, Registration
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.history import Outcome
from faults.roles.base import INSTANCES, Process

KEYS_COUNT: Final = 3
HANG_TTLS: Final = 2.6
"""Length of a hang in TTLs: longer than the 2 TTLs after which a hanging process is marked."""

LOSS_POLL_S: Final = 0.1


async def run(process: Process) -> None:
    """Keep keys until the end; change them until told to rest."""
    registry = await process.open_registry()
    process.recorder.note("started", role="worker", lease=format_instance_id(registry.lease_id))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR2, time.sleep, HANG_TTLS * process.orders.ttl_s)
    try:
        await asyncio.gather(_Keeper(process, registry).run(), _note_losses(process, registry))
    finally:
        await registry.aclose()


async def _note_losses(process: Process, registry: RedisRegistry) -> None:
    """Note each time at which the lease had to be granted again."""
    known = 0
    while True:
        if registry.lease_losses != known:
            known = registry.lease_losses
            process.recorder.note("lease_lost", count=known)
        await asyncio.sleep(LOSS_POLL_S)


class _Keeper:
    def __init__(self, process: Process, registry: RedisRegistry) -> None:
        self._process = process
        self._registry = registry
        self._registrations: dict[str, Registration] = {}
        self._keys = [f"{INSTANCES}{process.orders.process}/{n}" for n in range(KEYS_COUNT)]

    async def run(self) -> None:
        for key in self._keys:
            await self._register(key)
        while not self._process.resting.is_set():
            key = self._process.rng.choice(self._keys)
            if key not in self._registrations:
                await self._register(key)
            elif self._process.rng.random() < 0.8:
                await self._update(key)
            else:
                await self._unregister(key)
            await self._process.pause()

    async def _register(self, key: str) -> None:
        value = self._process.new_value()
        exclusive = key == self._keys[0]
        stalled = f"stalled:{value}".encode() if key == self._keys[1] else None

        def on_lost(reason: LostReason) -> None:
            self._registrations.pop(key, None)
            self._process.recorder.note("lost", key=key, reason=reason)

        async def attempt() -> tuple[Outcome, Any]:
            try:
                self._registrations[key] = await self._registry.register(
                    key, value.encode(), exclusive=exclusive, stalled_value=stalled, on_lost=on_lost
                )
            except KeyExists:
                return "refused", {"exists": True}
            return "ok", {}

        await self._process.call("register", attempt, key=key, value=value, exclusive=exclusive)

    async def _update(self, key: str) -> None:
        value, registration = self._process.new_value(), self._registrations[key]
        stalled = f"stalled:{value}".encode() if key == self._keys[1] else None

        async def attempt() -> tuple[Outcome, Any]:
            try:
                revision = await registration.update(value.encode(), stalled_value=stalled)
            except LeaseNotFound:
                return "refused", {"lost": registration.lost}
            return "ok", {"revision": revision}

        await self._process.call("update", attempt, key=key, value=value)

    async def _unregister(self, key: str) -> None:
        registration = self._registrations.pop(key)

        async def attempt() -> tuple[Outcome, Any]:
            await registration.unregister()
            return "ok", {}

        await self._process.call("unregister", attempt, key=key)
