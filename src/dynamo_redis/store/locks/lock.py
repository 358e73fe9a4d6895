"""Locks on any `LockStorage`: acquire, hold, write, release.

A holding is identified by a random owner id. Acquiring stores this id with a TTL, unless the lock has another
owner, and returns a fencing token. Releasing deletes the id if it is still stored. Every call may be
repeated: an owner that acquires twice finds its own id, and writes are numbered. So a call whose answer was
lost is sent again at once.

A caller that waits for a lock asks for it about every `POLL_S`. The more callers wait, the sooner one of them
asks. No wake-up can be lost, and the server keeps no state of waiting callers.
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
"""Longest time in which a release is retried. A lock that is not released ends with its TTL."""


class LockStorage(Protocol):
    """The storage of locks: Redis (`redis_locks`) or this process (`memory`). Each call is atomic.

    Raises StoreError. After StoreUnavailable a call may have taken effect, may still do so, or never will.
    """

    @property
    def timeout_s(self) -> float:
        """Longest wait for one answer."""
        ...

    async def acquire(self, keys: LockKeys, owner: str, ttl_s: float, process: str) -> int | LockHolder:
        """Acquire the lock if it is free or this owner's. Return the owner's token, or the other holder."""
        ...

    async def renew(self, keys: LockKeys, owner: str, ttl_s: float) -> bool:
        """Give the owner another TTL; False if the lock is not this owner's."""
        ...

    async def release(self, keys: LockKeys, owner: str) -> None:
        """Free the lock if it is this owner's."""
        ...

    async def write(self, keys: LockKeys, owner: str, token: int, number: int, value: bytes) -> bool:
        """Replace the protected value; return False if the lock is not this owner's.

        `number` counts the writes of a holding. A write whose number is not above the last one written is
        ignored, and returns True."""
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
            await self._release(owner)  # the last attempt may have been granted
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
        """Return the token, and the time at which the successful call was sent.

        A failed attempt is repeated while there is time, so the call may take one attempt longer."""
        began_at = time.monotonic()
        backoff = Backoff()
        process = f"{socket.gethostname()} pid {os.getpid()}"
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
                    raise LockNotAcquired(
                        self._keys.name,
                        f"{answer.process} (token {answer.fencing_token},"
                        f" {answer.remaining_s:.1f} s of its TTL left)",
                    )
                wait_s = min(left_s, max(0.001, answer.remaining_s), random.uniform(0.5, 1.5) * POLL_S)  # noqa: S311
            await asyncio.sleep(wait_s)

    async def _release(self, owner: str) -> None:
        """Release the lock, with retries for `RELEASE_S`. Never raises StoreError."""
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
        unanswered: StoreUnavailable | None = None  # an attempt that may have written
        while (reason := self._guard.lost) is None:
            try:
                if await self._storage.write(self._keys, self.owner, self.fencing_token, number, value):
                    return
                self._guard.lose("it ended on the server, or has another holder")
            except StoreUnavailable as exc:
                unanswered = exc
                wait_s = backoff.next_s()
                if time.monotonic() + wait_s >= until:
                    raise
                await asyncio.sleep(wait_s)
        raise unanswered or LockLost(self.name, reason)


def _reason(exc: Exception) -> str:
    return str(exc) or "Redis does not answer in time"
