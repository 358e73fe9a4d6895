"""redis-py's lock, used as its documentation shows: take it, then write."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import LockError

from dynamo_redis.errors import LockNotAcquired
from dynamo_redis.store.base import LockedValue


class PlainHeld:
    """A lock that was held once. `fencing_token` counts the grants; only the oracle uses it."""

    def __init__(self, client: Redis, key: str, token: int) -> None:
        self._client = client
        self._key = key
        self.fencing_token = token

    async def write(self, value: bytes) -> None:
        """Replace the protected value."""
        fields: dict[Any, Any] = {"value": value, "token": self.fencing_token}
        await self._client.hset(self._key, mapping=fields)


class PlainLock:
    """One lock, with the calls of `base.Lock` that a scenario needs."""

    def __init__(self, client: Redis, name: str, ttl_s: float) -> None:
        self._client = client
        self._name = name
        self._ttl_s = ttl_s

    @contextlib.asynccontextmanager
    async def hold(self, *, timeout_s: float = 0.0) -> AsyncIterator[PlainHeld]:
        """Hold it. Raises LockNotAcquired."""
        lock = self._client.lock(
            f"{self._name}:lock", timeout=self._ttl_s, sleep=0.01, blocking_timeout=timeout_s
        )
        if not await lock.acquire():
            raise LockNotAcquired(self._name, "another holder")
        try:
            yield PlainHeld(
                self._client, f"{self._name}:value", await self._client.incr(f"{self._name}:fence")
            )
        finally:
            with contextlib.suppress(LockError):
                await lock.release()

    async def read(self) -> LockedValue | None:
        """Return the protected value."""
        value: Any = await self._client.hget(f"{self._name}:value", "value")
        token: Any = await self._client.hget(f"{self._name}:value", "token")
        return None if value is None else LockedValue(value, int(token))


class PlainLocks:
    """Locks of one server; `aclose` closes the connection."""

    def __init__(self, url: str, prefix: str) -> None:
        self._client = Redis.from_url(url)
        self._prefix = prefix

    def lock(self, name: str, *, ttl_s: float) -> PlainLock:
        """Return the lock `name`."""
        return PlainLock(self._client, f"{{{self._prefix}/{name}}}", ttl_s)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()
