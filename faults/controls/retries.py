"""A client that retries as redis-py does by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from dynamo_redis.store.redis.client import Argument, RedisClient
from dynamo_redis.store.scripts import Script

RETRIES_COUNT = 10  # redis-py's default; its waits, of up to 10 s, are shortened


class RetryingClient(RedisClient):
    """Sends a script again when its connection breaks, as if it had not been sent before."""

    def __init__(self, url: str, *, timeout_s: float, client_name: str = "retrying") -> None:
        super().__init__(url, timeout_s=timeout_s, client_name=client_name)
        backoff = ExponentialWithJitterBackoff(base=0.01, cap=0.1)
        self._plain: Any = Redis.from_url(url, retry=Retry(backoff, RETRIES_COUNT), protocol=2)
        self._plain.response_callbacks.clear()

    async def script(self, script: Script, keys: Sequence[Argument], args: Sequence[Argument] = ()) -> Any:
        """Run a script like `RedisClient.script`, except for the retries and the deadline."""
        return await self._plain.execute_command("EVAL", script.source, len(keys), *keys, *args)

    async def aclose(self) -> None:
        """Close the client like `RedisClient.aclose`."""
        await self._plain.aclose()
        await super().aclose()
