"""Clients that take a lock, write under it, read the protected value, and release it: several for each
lock."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from dynamo_redis.errors import LockLost, LockNotAcquired
from dynamo_redis.store.base import HeldLock, Lock
from dynamo_redis.store.locks.redis_locks import RedisLocks
from faults.history import Outcome
from faults.roles.base import Process

LOCKS: Final = ("l0", "l1")
WAIT_S: Final = 0.5
"""Longest wait in seconds for a lock that another client has."""


async def run(process: Process) -> None:
    """Take locks until told to rest, then stay."""
    locks = RedisLocks.from_settings(process.settings())
    process.recorder.note("started", role="locker", lease=None)
    try:
        await asyncio.gather(*(_Client(process, locks, name).run() for name in LOCKS))
        await asyncio.Event().wait()
    finally:
        await locks.aclose()


class _Client:
    def __init__(self, process: Process, locks: RedisLocks, name: str) -> None:
        self._process = process
        self._name = name
        self._lock: Lock = locks.lock(name, ttl_s=process.orders.ttl_s)

    async def run(self) -> None:
        while not self._process.resting.is_set():
            if self._process.rng.random() < 0.3:
                await self._read()
            else:
                with contextlib.suppress(LockLost):
                    await self._hold()
            await self._process.pause()

    async def _hold(self) -> None:
        """Acquire, write a few times, release. Raises LockLost when the lock was lost meanwhile."""
        stack = contextlib.AsyncExitStack()

        async def acquire() -> tuple[Outcome, Any]:
            timeout_s = self._process.rng.uniform(0, WAIT_S)
            try:
                held = await stack.enter_async_context(self._lock.hold(timeout_s=timeout_s))
            except LockNotAcquired:
                return "refused", {}
            holding.append(held)
            return "ok", {"token": held.fencing_token}

        holding: list[HeldLock] = []
        async with stack:
            await self._process.call("lock_acquire", acquire, lock=self._name)
            for held in holding:
                for _ in range(self._process.rng.randint(0, 5)):
                    await self._write(held)
                    await self._process.pause()

    async def _write(self, held: HeldLock) -> None:
        value = self._process.new_value()

        async def attempt() -> tuple[Outcome, Any]:
            try:
                await held.write(value.encode())
            except LockLost:
                return "refused", {}
            return "ok", {}

        asked = {"lock": self._name, "token": held.fencing_token, "value": value}
        await self._process.call("lock_write", attempt, **asked)

    async def _read(self) -> None:
        async def attempt() -> tuple[Outcome, Any]:
            found = await self._lock.read()
            if found is None:
                return "ok", {"value": None, "token": None}
            return "ok", {"value": found.value.decode(), "token": found.fencing_token}

        await self._process.call("lock_read", attempt, lock=self._name)
