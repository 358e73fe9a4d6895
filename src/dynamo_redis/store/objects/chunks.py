"""The chunks of one object in Redis: sent once, kept alive, fetched, and reported when they are damaged.

Every call here may be repeated, and is repeated when a connection breaks: a chunk's key names its content.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreError, StoreUnavailable
from dynamo_redis.store.keys import ObjectKeys
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.scripts import load_script

log = logging.getLogger(__name__)

EXPIRY_S = 600.0
CLAIM_S = 2.0
RECOVERY_S = 10.0

DAMAGE_IS_KNOWN_S = 86_400
"""Seconds for which a chunk that a reader found damaged is known as such."""

_POLL_S = (0.005, 0.02)
_KEYS_A_CALL = 500

_CLAIM = load_script("object_claim")
_RENEW = load_script("object_renew")
_ABSENT, _THERE, _DAMAGED, _CLAIMED = range(4)  # answers of _CLAIM

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ObjectTimes:
    """Time limits of the object store, in seconds.

    `expiry_s`: lifetime, unless renewed, of a chunk that belongs to no current version: of an upload, or of a
    replaced version. `claim_s`: lifetime, unless renewed, of an upload's claim to send a chunk; after it,
    other uploads of the same chunk send it themselves. `recovery_s`: time for which an upload or a read under
    way retries while Redis does not answer.
    """

    expiry_s: float = EXPIRY_S
    claim_s: float = CLAIM_S
    recovery_s: float = RECOVERY_S

    @property
    def expiry_ms(self) -> int:
        """The same in ms, for Redis."""
        return round(self.expiry_s * 1000)

    @property
    def claim_ms(self) -> int:
        """The same in ms, for Redis."""
        return round(self.claim_s * 1000)


async def recovering(client: StoreClient, recovery_s: float, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat an idempotent call until it succeeds, or `recovery_s` have passed since its first failure.

    The time counts from the first failure, since over a slow link that may come late. Raises the last
    StoreUnavailable, and any other StoreError at once.
    """
    give_up_at: float | None = None
    backoff = Backoff()
    while True:
        try:
            return await call()
        except StoreUnavailable as exc:
            give_up_at = give_up_at or time.monotonic() + recovery_s
            pause_s = backoff.next_s()
            if client.closed or time.monotonic() + pause_s > give_up_at:
                raise
            log.debug("once more in %.3f s: %s", pause_s, exc)
            await client.pause(pause_s)


class ObjectChunks:
    """The chunks of one object. Cancelling a call is safe: a chunk is stored completely or not at all."""

    def __init__(self, client: StoreClient, keys: ObjectKeys, times: ObjectTimes) -> None:
        self._client = client
        self._keys = keys
        self._times: Final = times

    async def send(self, name: str, content: bytes, upload: str) -> None:
        """Store a chunk, unless Redis has it; it lives for `expiry_s` from now at least.

        Waits while another upload sends the same chunk. A chunk of the current version never gets an expiry
        here. Of a chunk that Redis has, only the size is checked. A chunk that a reader found damaged is sent
        again. Raises StoreError.
        """

        key, expiry_ms = self._keys.chunk(name), self._times.expiry_ms

        async def attempt() -> bool:
            state: int = await self._client.script(
                _CLAIM,
                [key, self._keys.claim(name), self._keys.damaged],
                [name, expiry_ms, len(content), upload, self._times.claim_ms],
            )
            if state == _ABSENT:
                async with self._claiming(name, upload):
                    # NX: another upload of the same content may have written it first.
                    await self._client.execute("SET", key, content, "PX", expiry_ms, "NX")
            elif state == _DAMAGED:
                async with self._claiming(name, upload):
                    await self._client.execute("SET", key, content, "KEEPTTL", "XX")
                await self._client.execute("SREM", self._keys.damaged, name)
            return state != _CLAIMED  # by another upload

        while True:
            if await recovering(self._client, self._times.recovery_s, attempt):
                return
            await asyncio.sleep(random.uniform(*_POLL_S))  # noqa: S311 - jitter, not a secret

    @contextlib.asynccontextmanager
    async def _claiming(self, name: str, upload: str) -> AsyncIterator[None]:
        """Renew the claim on a chunk while it is sent: over a slow link the claim would end before."""

        async def claim() -> None:
            while True:
                await asyncio.sleep(self._times.claim_s / 2)
                with contextlib.suppress(StoreError):
                    await self._client.execute(
                        "SET", self._keys.claim(name), upload, "PX", self._times.claim_ms, "XX"
                    )

        task = asyncio.create_task(claim(), name=f"claim a chunk of {self._keys.url}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def fetch(self, name: str) -> bytes | None:
        """Return a chunk, not verified; None if it is gone. Raises StoreError."""

        async def attempt() -> bytes | None:
            content: bytes | None = await self._client.execute("GET", self._keys.chunk(name))
            return content

        return await recovering(self._client, self._times.recovery_s, attempt)

    async def renew(self, names: Sequence[str]) -> None:
        """Let chunks live for another `expiry_s`. Chunks without an expiry get none. Raises StoreError."""
        chunks = self._keys.chunks(names)
        for start in range(0, len(chunks), _KEYS_A_CALL):
            part = chunks[start : start + _KEYS_A_CALL]
            await self._client.script(_RENEW, part, [self._times.expiry_ms])

    async def are_whole(self, names: Sequence[str]) -> bool:
        """Return whether all of these chunks exist, and none is known to be damaged. Raises StoreError."""
        parts = [names[start : start + _KEYS_A_CALL] for start in range(0, len(names), _KEYS_A_CALL)]
        damaged, *there = await self._client.pipeline(
            [("SMEMBERS", self._keys.damaged), *(("EXISTS", *self._keys.chunks(part)) for part in parts)]
        )
        return sum(there) == len(names) and not set(damaged).intersection(name.encode() for name in names)

    async def report_damage(self, name: str) -> None:
        """Mark a chunk as damaged, so that the next put sends it again.

        Deletes nothing: the fault may be in the reader."""
        try:
            await self._client.pipeline(
                [
                    ("SADD", self._keys.damaged, name),
                    ("EXPIRE", self._keys.damaged, DAMAGE_IS_KNOWN_S),
                ]
            )
        except StoreError as exc:
            log.debug("%s: damage not reported: %s", self._keys.url, exc)
