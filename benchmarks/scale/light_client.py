"""A client of Redis that costs its process less: for harness processes that stand for sixty others each.

It sends what the product's client sends, byte for byte but for the connection: one connection of the kind
that the product has for blocking reads carries all commands, one call at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from dynamo_redis.store.redis.blocking import Argument, pack
from dynamo_redis.store.redis.client import RedisClient


class LightClient(RedisClient):
    """`RedisClient` whose commands and transactions go over one connection. Scripts go the usual way."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        super().__init__(url, timeout_s=timeout_s, client_name="dynamo-redis-events")
        self._line = self.blocking("")
        self._turn = asyncio.Lock()

    async def execute(self, *command: Argument, beside: Argument | None = None) -> Any:
        del beside
        async with self._turn:
            return await self._line.execute(pack(*command), block_s=0.0)

    async def pipeline(
        self, commands: Iterable[Sequence[Argument]], *, transaction: bool = False
    ) -> list[Any]:
        packed = [pack(*command) for command in commands]
        async with self._turn:
            if not transaction:
                return await self._line.execute_all(packed, block_s=0.0)
            answers = await self._line.execute_all([pack("MULTI"), *packed, pack("EXEC")], block_s=0.0)
        found: list[Any] = answers[-1]
        return found

    async def aclose(self) -> None:
        await self._line.aclose()
        await super().aclose()
