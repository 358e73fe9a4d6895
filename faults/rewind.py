"""A rewind of history: the state after a failover that lost a tail, on one server and at one moment."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_redis.store.redis.client import Argument
from faults.servers import ServerUnderTest


class Rewind:
    """All of a registry's keys at the time of `capture`; `undo_since` brings them back."""

    def __init__(self, server: ServerUnderTest, dumps: dict[bytes, bytes]) -> None:
        self._server = server
        self._dumps = dumps

    @classmethod
    async def capture(cls, server: ServerUnderTest, prefix: str) -> Rewind:
        """Remember a registry's keys. Keys with a TTL are hints, and left alone."""
        keys = await server.execute("KEYS", f"{{{prefix}}}:*")
        lasting = [key for key in keys if await server.execute("PTTL", key) == -1]
        dumps = await server.atomically(*(("DUMP", key) for key in lasting))
        return cls(server, dict(zip(lasting, dumps, strict=True)))

    async def undo_since(self) -> None:
        """Undo every write since then, at once."""
        restore: list[Sequence[Argument]] = [
            ("RESTORE", key, 0, dump, "REPLACE") for key, dump in self._dumps.items()
        ]
        await self._server.atomically(*restore)
