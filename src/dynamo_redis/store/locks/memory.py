"""Locks in memory: for tests, and for programs that run in one process.

They implement the rules of the Lua scripts a second time. The contract suite runs on both, and a model test
compares them. TTLs count on the given clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.store.base import LockedValue, LockHolder
from dynamo_redis.store.keys import LockKeys
from dynamo_redis.store.locks.lock import StoredLocks


class MemoryLocks(StoredLocks):
    """`Locks` that all holders share, on one event loop."""

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(MemoryLockStorage(clock), "memory")


@dataclass(slots=True)
class _Holding:
    owner: str
    token: int
    process: str
    ends_at: float


@dataclass(frozen=True, slots=True)
class _Stored:
    """The last protected write: its value, its holding, and its number in that holding."""

    value: LockedValue | None
    owner: str
    number: int

    @property
    def token(self) -> int:
        return 0 if self.value is None else self.value.fencing_token


_NOTHING = _Stored(None, "", 0)


class MemoryLockStorage:
    """`LockStorage` in dictionaries. Every method is one atomic step, as one script is."""

    timeout_s = 3.0

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._holdings: dict[str, _Holding] = {}
        self._last_tokens: dict[str, int] = {}
        self._values: dict[str, _Stored] = {}

    async def acquire(self, keys: LockKeys, owner: str, ttl_s: float, process: str) -> int | LockHolder:
        """As `LockStorage.acquire`."""
        held = self._current(keys)
        if held is None:
            seen = (self._last_tokens.get(keys.tag, 0), self._values.get(keys.tag, _NOTHING).token)
            token = max(int(self._clock.wall() * 1_000_000), max(seen) + 1)
            self._last_tokens[keys.tag] = token
            held = self._holdings[keys.tag] = _Holding(owner, token, process, 0.0)
        elif held.owner != owner:
            return self._describe(held)
        held.ends_at = self._clock.monotonic() + ttl_s
        return held.token

    async def renew(self, keys: LockKeys, owner: str, ttl_s: float) -> bool:
        """As `LockStorage.renew`."""
        held = self._current(keys)
        if held is None or held.owner != owner:
            return False
        held.ends_at = self._clock.monotonic() + ttl_s
        return True

    async def release(self, keys: LockKeys, owner: str) -> None:
        """As `LockStorage.release`."""
        held = self._current(keys)
        if held is not None and held.owner == owner:
            del self._holdings[keys.tag]

    async def write(self, keys: LockKeys, owner: str, token: int, number: int, value: bytes) -> bool:
        """As `LockStorage.write`."""
        stored = self._values.get(keys.tag, _NOTHING)
        if stored.owner == owner and stored.number >= number:
            return True
        held = self._current(keys)
        if held is None or held.owner != owner or stored.token > token:
            return False
        self._values[keys.tag] = _Stored(LockedValue(value, token), owner, number)
        return True

    async def read(self, keys: LockKeys) -> LockedValue | None:
        """As `LockStorage.read`."""
        return self._values.get(keys.tag, _NOTHING).value

    async def holder(self, keys: LockKeys) -> LockHolder | None:
        """As `LockStorage.holder`."""
        held = self._current(keys)
        return None if held is None else self._describe(held)

    async def aclose(self) -> None:
        """Do nothing: there are no resources to release."""

    def _current(self, keys: LockKeys) -> _Holding | None:
        held = self._holdings.get(keys.tag)
        if held is not None and held.ends_at <= self._clock.monotonic():
            del self._holdings[keys.tag]
            return None
        return held

    def _describe(self, held: _Holding) -> LockHolder:
        left_s = held.ends_at - self._clock.monotonic()
        return LockHolder(held.owner, held.token, held.process, left_s)
