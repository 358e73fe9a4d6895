"""The keys of locks in Redis, and their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer

PASSWORD = "secret"


@pytest.fixture
def rows(repository: Path) -> list[tuple[str, ...]]:
    """Return the table rows of the page's section on locks: name, type and TTL of keys; name of fields."""
    page = (repository / "docs" / "redis-schema.md").read_text("utf-8")
    part = page.split("\n## Locks\n")[1].split("\n## ")[0]
    return re.findall(r"^\| (?:\*tag\*)?`(:?\w+)` \|(?: (\w+) \| ([^|]+) \|)?", part, flags=re.MULTILINE)


async def test_redis_holds_exactly_the_keys_of_the_schema_page(
    own_redis_server: EmbeddedServer, dynamo_redis_prefix: str, rows: list[tuple[str, ...]]
) -> None:
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    tag = f"{{{dynamo_redis_prefix}/lock/a%20b}}"
    async with RedisLocks(client, dynamo_redis_prefix).lock("a b").hold() as held:
        await held.write(b"x")
        found, fields = {}, []
        async for key in client.scan("*"):
            kind, left_ms = await client.pipeline([("TYPE", key), ("PTTL", key)])
            found[key.decode().removeprefix(tag)] = (kind.decode(), left_ms > 0)
        for name in ("lock", "value"):
            fields += (await client.execute("HGETALL", f"{tag}:{name}"))[::2]
    await client.aclose()
    keys = [row for row in rows if row[0].startswith(":")]
    assert found == {name: (kind, ttl != "none") for name, kind, ttl in keys}
    assert [field.decode() for field in fields] == [name for name, kind, _ in rows if not kind]


async def test_the_rights_that_the_security_page_names_are_enough(
    own_redis_server: EmbeddedServer, repository: Path
) -> None:
    page = (repository / "docs" / "security.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("ACL SETUSER dyn ")]
    admin = RedisClient(own_redis_server.url, timeout_s=1.0)
    await admin.execute(*line.replace("PASSWORD", PASSWORD).split())
    await admin.aclose()
    url = own_redis_server.url.replace("redis://", f"redis://dyn:{PASSWORD}@")
    locks = RedisLocks(RedisClient(url, timeout_s=1.0), "dynamo")
    for lock in (locks.lock("a"), locks.object_lock("b", "n")):
        async with lock.hold() as held:
            await held.write(b"x")
            assert await lock.holder() is not None
            assert await lock.read() is not None
        assert await lock.holder() is None
    await locks.aclose()
