"""The locks' scripts as typed calls. Each is atomic, runs once, and takes at most the client's time-out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.base import LockedValue, LockHolder
from dynamo_redis.store.keys import LockKeys
from dynamo_redis.store.locks.lock import StoredLocks
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.scripts import load_script

_ACQUIRE = load_script("lock_acquire")
_RENEW = load_script("lock_renew")
_RELEASE = load_script("lock_release")
_WRITE = load_script("lock_write")


class RedisLocks(StoredLocks):
    """`Locks` on one Redis or Valkey. `aclose` closes the client."""

    def __init__(self, client: StoreClient, prefix: str) -> None:
        super().__init__(RedisLockStorage(client), prefix)

    @classmethod
    def from_settings(cls, settings: StoreSettings) -> Self:
        """Return locks with a client of their own, not yet connected. Raises ConfigError if no server is
        configured."""
        url, timeout_s = settings.require_url(), settings.command_timeout_s
        name, login = "dynamo-redis-locks", settings.login()
        return cls(open_client(url, timeout_s=timeout_s, client_name=name, login=login), settings.prefix)


class RedisLockStorage:
    """`LockStorage` in Redis."""

    def __init__(self, client: StoreClient) -> None:
        self._client = client

    @property
    def timeout_s(self) -> float:
        """As `LockStorage.timeout_s`."""
        return self._client.timeout_s

    async def acquire(self, keys: LockKeys, owner: str, ttl_s: float, process: str) -> int | LockHolder:
        """As `LockStorage.acquire`."""
        answer, *rest = await self._client.script(
            _ACQUIRE, [keys.lock, keys.fence, *keys.protected], [owner, _ms(ttl_s), process]
        )
        return int(rest[0]) if answer == b"ok" else _holder(rest)

    async def renew(self, keys: LockKeys, owner: str, ttl_s: float) -> bool:
        """As `LockStorage.renew`."""
        return bool(await self._client.script(_RENEW, [keys.lock], [owner, _ms(ttl_s)]))

    async def release(self, keys: LockKeys, owner: str) -> None:
        """As `LockStorage.release`."""
        await self._client.script(_RELEASE, [keys.lock], [owner])

    async def write(self, keys: LockKeys, owner: str, token: int, number: int, value: bytes) -> bool:
        """As `LockStorage.write`."""
        return bool(await self._client.script(_WRITE, [keys.lock, keys.value], [owner, token, number, value]))

    async def read(self, keys: LockKeys) -> LockedValue | None:
        """As `LockStorage.read`."""
        value, token = await self._client.execute("HMGET", keys.value, "value", "token")
        return None if value is None else LockedValue(value, int(token))

    async def holder(self, keys: LockKeys) -> LockHolder | None:
        """As `LockStorage.holder`."""
        fields, left_ms = await self._client.pipeline(
            [("HMGET", keys.lock, "owner", "token", "process"), ("PTTL", keys.lock)]
        )
        return None if fields[0] is None else _holder([*fields, left_ms])

    async def aclose(self) -> None:
        """Close the connections. Never raises for a dead server."""
        await self._client.aclose()


def _holder(fields: Sequence[bytes | int]) -> LockHolder:
    """Read owner, token, process, and the rest of the TTL in ms."""
    owner, token, process, left_ms = fields
    assert isinstance(owner, bytes)
    assert isinstance(process, bytes)
    return LockHolder(owner.decode(), int(token), process.decode(), max(0, int(left_ms)) / 1000)


def _ms(ttl_s: float) -> int:
    return math.ceil(ttl_s * 1000)
