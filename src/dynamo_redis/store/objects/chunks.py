"""The chunks of one object in Redis: sent once, kept alive, fetched, and told of when they are damaged.

Everything here may be repeated, and is, when a connection breaks: a chunk's key says what it holds.
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
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.scripts import load_script

log = logging.getLogger(__name__)

EXPIRY_S = 600.0
CLAIM_S = 2.0
RECOVERY_S = 10.0

_POLL_S = (0.005, 0.02)
_DAMAGE_IS_KNOWN_S = 86_400
_KEYS_A_CALL = 500

_CLAIM = load_script("object_claim")
_RENEW = load_script("object_renew")
_ABSENT, _THERE, _DAMAGED, _CLAIMED = range(4)  # what _CLAIM answers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take.

    `expiry_s`: how long chunks live that no current version has, unless renewed: of uploads, and of replaced
    versions. `claim_s`: how long others wait for an upload that has stopped saying that it sends a chunk
    which they have, too, before they send it themselves. `recovery_s`: how long an upload or a read under way
    tries again while Redis does not answer.
    """

    expiry_s: float = EXPIRY_S
    claim_s: float = CLAIM_S
    recovery_s: float = RECOVERY_S

    @property
    def expiry_ms(self) -> int:
        """The same, as Redis wants it."""
        return round(self.expiry_s * 1000)

    @property
    def claim_ms(self) -> int:
        """The same, as Redis wants it."""
        return round(self.claim_s * 1000)


async def recovering(client: RedisClient, recovery_s: float, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat what can do no harm twice until it succeeds, or has failed for `recovery_s` since its first
    failure: over a slow link that one may come late.

    Raises the last StoreUnavailable, and any other StoreError at once.
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
            await asyncio.sleep(pause_s)


class ObjectChunks:
    """One object's chunks. Cancelling a call is safe: a chunk is there as a whole or not at all."""

    def __init__(self, client: RedisClient, keys: ObjectKeys, patience: Patience) -> None:
        self._client = client
        self._keys = keys
        self._patience: Final = patience

    async def send(self, name: str, content: bytes, upload: str) -> None:
        """Bring a chunk to Redis, unless it is there; it lives for `expiry_s` from now at least.

        What another upload is sending is waited for. A chunk of the current version never gets an expiry
        here. That a chunk which is there is intact is not checked, but for its size: only a reader can tell,
        and a chunk that one found damaged is sent again. Raises StoreError.
        """

        async def attempt() -> bool:
            return await self._try_to_send(name, content, upload)

        while True:
            if await recovering(self._client, self._patience.recovery_s, attempt):
                return
            await asyncio.sleep(random.uniform(*_POLL_S))  # noqa: S311 - jitter, not a secret

    async def _try_to_send(self, name: str, content: bytes, upload: str) -> bool:
        """False if another upload is about to."""
        key, expiry_ms = self._keys.chunk(name), self._patience.expiry_ms
        state: int = await self._client.script(
            _CLAIM,
            [key, self._keys.claim(name), self._keys.damaged],
            [name, expiry_ms, len(content), upload, self._patience.claim_ms],
        )
        if state == _ABSENT:
            async with self._claiming(name, upload):
                # If another upload of the same content wrote it first, it is right as it is.
                await self._client.execute("SET", key, content, "PX", expiry_ms, "NX")
        elif state == _DAMAGED:
            async with self._claiming(name, upload):
                await self._client.execute("SET", key, content, "KEEPTTL", "XX")
            await self._client.execute("SREM", self._keys.damaged, name)
        return state != _CLAIMED

    @contextlib.asynccontextmanager
    async def _claiming(self, name: str, upload: str) -> AsyncIterator[None]:
        """Keep the claim on a chunk while it is sent: over a slow link a claim alone would end before."""

        async def claim() -> None:
            while True:
                await asyncio.sleep(self._patience.claim_s / 2)
                with contextlib.suppress(StoreError):
                    await self._client.execute(
                        "SET", self._keys.claim(name), upload, "PX", self._patience.claim_ms, "XX"
                    )

        task = asyncio.create_task(claim(), name=f"claim a chunk of {self._keys.url}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def fetch(self, name: str) -> bytes | None:
        """A chunk as it stands, not verified; None if it is gone. Raises StoreError."""

        async def attempt() -> bytes | None:
            content: bytes | None = await self._client.execute("GET", self._keys.chunk(name))
            return content

        return await recovering(self._client, self._patience.recovery_s, attempt)

    async def renew(self, names: Sequence[str]) -> None:
        """Let chunks live for another `expiry_s`; those without an expiry keep none. Raises StoreError."""
        chunks = self._keys.chunks(names)
        for start in range(0, len(chunks), _KEYS_A_CALL):
            part = chunks[start : start + _KEYS_A_CALL]
            await self._client.script(_RENEW, part, [self._patience.expiry_ms])

    async def are_whole(self, names: Sequence[str]) -> bool:
        """Whether all of these are there, and none is known to be damaged. Raises StoreError."""
        parts = [names[start : start + _KEYS_A_CALL] for start in range(0, len(names), _KEYS_A_CALL)]
        damaged, *there = await self._client.pipeline(
            [("SMEMBERS", self._keys.damaged), *(("EXISTS", *self._keys.chunks(part)) for part in parts)]
        )
        return sum(there) == len(names) and not set(damaged).intersection(name.encode() for name in names)

    async def report_damage(self, name: str) -> None:
        """Have the next put send this chunk again. Deletes nothing: it may be the reader that is ill."""
        try:
            await self._client.pipeline(
                [
                    ("SADD", self._keys.damaged, name),
                    ("EXPIRE", self._keys.damaged, _DAMAGE_IS_KNOWN_S),
                ]
            )
        except StoreError as exc:
            log.debug("%s: damage not reported: %s", self._keys.url, exc)
