"""Locks, on whatever stores them: acquire, hold, write, release.

A holding is a random owner. Acquiring stores it with a TTL, if nobody else's is there, and answers a fencing
token; releasing deletes it, if it is still there. Every call may be repeated: an owner that acquires twice
finds itself, and writes are numbered. So a call whose answer was lost is sent again, at once.

Who waits for a lock asks for it every `POLL_S` or so. The more are waiting, the sooner one of them asks; no
wake-up can be lost; and nothing is kept on the server for those who wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator
from typing import Final, Protocol

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import ConfigError, LockLost, LockNotAcquired, StoreError, StoreUnavailable
from dynamo_redis.store.base import LOCK_TTL_S, HeldLock, Lock, LockedValue, LockHolder
from dynamo_redis.store.keys import LockKeys
from dynamo_redis.store.locks.guard import LeaseGuard

log = logging.getLogger(__name__)

POLL_S: Final = 0.05
MINIMUM_TTL_S: Final = 0.1
MAXIMUM_TTL_S: Final = 86_400.0
RELEASE_S: Final = 1.0
"""How long a release is tried: a lock that is not given back ends with its TTL."""


class LockStorage(Protocol):
    """What locks are stored in: Redis (`redis_locks`) or this process (`memory`). Each call is atomic.

    Raises StoreError. After StoreUnavailable a call may have happened, may still happen, or never.
    """

    @property
    def timeout_s(self) -> float:
        """Longest wait for one answer."""
        ...

    async def acquire(self, keys: LockKeys, owner: str, ttl_s: float, process: str) -> int | LockHolder:
        """Take the lock if it is free or this owner's; answer the owner's token, or who else has it."""
        ...

    async def renew(self, keys: LockKeys, owner: str, ttl_s: float) -> bool:
        """Give the owner another TTL; False if the lock is not this owner's."""
        ...

    async def release(self, keys: LockKeys, owner: str) -> None:
        """Free the lock if it is this owner's."""
        ...

    async def write(self, keys: LockKeys, owner: str, token: int, number: int, value: bytes) -> bool:
        """Replace the protected value; False if the lock is not this owner's. `number` counts the writes of
        a holding: one that was written, or came before one that was, is answered with True and ignored."""
        ...

    async def read(self, keys: LockKeys) -> LockedValue | None: ...

    async def holder(self, keys: LockKeys) -> LockHolder | None: ...

    async def aclose(self) -> None: ...


class StoredLocks:
    """`Locks` on a storage, which `aclose` closes."""

    def __init__(self, storage: LockStorage, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix

    def lock(self, name: str, *, ttl_s: float = LOCK_TTL_S) -> Lock:
        """As `Locks.lock`."""
        return StoredLock(self._storage, LockKeys.of_name(self._prefix, name), ttl_s)

    def object_lock(self, bucket: str, name: str, *, ttl_s: float = LOCK_TTL_S) -> Lock:
        """As `Locks.object_lock`."""
        return StoredLock(self._storage, LockKeys.of_object(self._prefix, bucket, name), ttl_s)

    async def aclose(self) -> None:
        """Close the storage. Locks that are held are lost at the end of their TTL."""
        await self._storage.aclose()


class StoredLock:
    """`Lock` on a storage."""

    def __init__(self, storage: LockStorage, keys: LockKeys, ttl_s: float) -> None:
        if not MINIMUM_TTL_S <= ttl_s <= MAXIMUM_TTL_S:
            raise ConfigError(f"a lock's TTL is {MINIMUM_TTL_S} s to {MAXIMUM_TTL_S:g} s, not {ttl_s}")
        self._storage = storage
        self._keys = keys
        self._ttl_s = ttl_s
        # Short enough for a second attempt within the TTL, and within the time of a call.
        self._attempt_s = min(storage.timeout_s, max(0.5, ttl_s / 4))

    @contextlib.asynccontextmanager
    async def hold(self, *, timeout_s: float = 0.0) -> AsyncIterator[HeldLock]:
        """As `Lock.hold`."""
        owner = secrets.token_hex(16)
        try:
            token, sent_at = await self._acquire(owner, timeout_s)
        except (StoreUnavailable, asyncio.CancelledError):
            await self._release(owner)  # what was sent last may have been granted
            raise
        guard = LeaseGuard(
            self._keys.name,
            ttl_s=self._ttl_s,
            sent_at=sent_at,
            attempt_s=self._attempt_s,
            renew=lambda: self._storage.renew(self._keys, owner, self._ttl_s),
        )
        try:
            async with guard:
                yield _Held(self._storage, self._keys, owner, token, guard)
        finally:
            if guard.released:
                await self._release(owner)

    async def read(self) -> LockedValue | None:
        """As `Lock.read`."""
        return await self._storage.read(self._keys)

    async def holder(self) -> LockHolder | None:
        """As `Lock.holder`."""
        return await self._storage.holder(self._keys)

    async def _acquire(self, owner: str, timeout_s: float) -> tuple[int, float]:
        """The token, and when the call that was answered was sent. Each failed attempt is followed by another
        while there is time, so it may take one attempt longer."""
        began_at = time.monotonic()
        backoff = Backoff()
        process = _describe_process()
        while True:
            sent_at = time.monotonic()
            try:
                async with asyncio.timeout(self._attempt_s):
                    answer = await self._storage.acquire(self._keys, owner, self._ttl_s, process)
            except (StoreUnavailable, TimeoutError) as exc:
                wait_s = backoff.next_s()
                if time.monotonic() + wait_s >= began_at + max(timeout_s, self._storage.timeout_s):
                    name = self._keys.name
                    raise StoreUnavailable(f"lock {name} cannot be acquired: {_reason(exc)}") from exc
            else:
                if isinstance(answer, int):
                    return answer, sent_at
                left_s = began_at + timeout_s - time.monotonic()
                if left_s <= 0:
                    raise LockNotAcquired(self._keys.name, _describe(answer))
                wait_s = min(left_s, max(0.001, answer.remaining_s), random.uniform(0.5, 1.5) * POLL_S)  # noqa: S311
            await asyncio.sleep(wait_s)

    async def _release(self, owner: str) -> None:
        """Try for `RELEASE_S`; never raises StoreError."""
        backoff = Backoff()
        try:
            async with asyncio.timeout(RELEASE_S):
                while True:
                    try:
                        return await self._storage.release(self._keys, owner)
                    except StoreUnavailable:
                        await asyncio.sleep(backoff.next_s())
        except (StoreError, TimeoutError) as exc:
            log.warning("lock %s is not released, it ends with its TTL: %s", self._keys.name, _reason(exc))


class _Held:
    """`HeldLock` on a storage."""

    def __init__(
        self, storage: LockStorage, keys: LockKeys, owner: str, token: int, guard: LeaseGuard
    ) -> None:
        self._storage = storage
        self._keys = keys
        self._guard = guard
        self._last_number = 0
        self.name = keys.name
        self.owner = owner
        self.fencing_token = token

    @property
    def lost(self) -> bool:
        """As `HeldLock.lost`."""
        return self._guard.lost is not None

    async def write(self, value: bytes) -> None:
        """As `HeldLock.write`."""
        self._last_number += 1
        number = self._last_number
        until = time.monotonic() + self._storage.timeout_s
        backoff = Backoff()
        doubt: StoreUnavailable | None = None  # an attempt that may have written
        while (reason := self._guard.lost) is None:
            try:
                if await self._storage.write(self._keys, self.owner, self.fencing_token, number, value):
                    return
                self._guard.lose("it ended on the server, or is somebody else's")
            except StoreUnavailable as exc:
                doubt = exc
                wait_s = backoff.next_s()
                if time.monotonic() + wait_s >= until:
                    raise
                await asyncio.sleep(wait_s)
        raise doubt or LockLost(self.name, reason)


def _describe_process() -> str:
    return f"{socket.gethostname()} pid {os.getpid()}"


def _describe(holder: LockHolder) -> str:
    return f"{holder.process} (token {holder.fencing_token}, {holder.remaining_s:.1f} s of its TTL left)"


def _reason(exc: Exception) -> str:
    return str(exc) or "Redis does not answer in time"
