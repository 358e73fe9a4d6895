"""No command reads a whole structure. Benchmark row S8 has the cost of each call."""

from __future__ import annotations

from contextlib import aclosing

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams.redis_streams import RedisEventStreams

STREAM = StreamName("n", "c", "topic")


async def test_last_old_entry_is_sought_only_where_one_is_old(own_redis_server: EmbeddedServer) -> None:
    """`XREVRANGE key OLD -` reads a whole stream if it has no entry that old."""
    settings = StoreSettings.load(redis_url=own_redis_server.url)
    async with RedisEventStreams.from_settings(settings, EventSettings.load()) as streams:
        for _ in range(3):
            await streams.append(STREAM, [NewEntry(b"x", 1)], max_age_s=3600.0)
        ran = await _commands(own_redis_server.url)
        assert "xadd" in ran
        assert "xrevrange" not in ran


async def test_list_of_objects_is_read_by_pages(own_redis_server: EmbeddedServer) -> None:
    settings = StoreSettings.load(redis_url=own_redis_server.url)
    async with aclosing(RedisObjectStore.from_settings(settings)) as objects:
        for number in range(3):
            await objects.put("b", str(number), b"content")
        assert len(await objects.list()) == 3
        ran = await _commands(own_redis_server.url)
        assert "zscan" in ran
        assert not ran & {"keys", "smembers", "zrange"}


async def _commands(url: str) -> set[str]:
    """Return the names of the commands that a server has run, including those of scripts."""
    client = RedisClient(url, timeout_s=10.0)
    stats = (await client.execute("INFO", "commandstats")).decode()
    await client.aclose()
    return {line.removeprefix("cmdstat_").partition(":")[0] for line in stats.splitlines() if ":" in line}
