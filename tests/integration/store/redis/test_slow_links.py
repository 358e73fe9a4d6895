"""Slow links that work: transfers longer than a time-out complete, and a peer that drips is given up.

Time-outs are short here and links slow in proportion, so that each exchange takes longer than a time-out.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.base import PutOp
from dynamo_redis.store.event_base import Entry, NewEntry, StreamName
from dynamo_redis.store.objects.chunks import ObjectTimes
from dynamo_redis.store.objects.content import CHUNK_BYTES
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis import blocking, deadline
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.page_size import PAGE_BYTES
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from faults.proxy import Conditions, Proxy

MIB = 1 << 20
TIMEOUT_S = 1.0
"""The proxy is in this process: one that is held up for so long looks like a dead server."""
WAIT_S = 60.0
STREAM = StreamName("test", "backend", "kv_events")


def content_of(seed: object, size_bytes: int = MIB) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size_bytes)


@pytest.fixture
async def slow(own_redis_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    """A link to the server on which 1 MiB takes longer than a time-out in each direction."""
    async with Proxy(own_redis_server.url) as proxy:
        proxy.conditions = Conditions(bytes_per_s=MIB / (1.3 * TIMEOUT_S))
        yield proxy


@pytest.fixture(params=["hiredis", "without hiredis"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of the answers of blocking reads: hiredis or redis-py."""
    monkeypatch.setattr("dynamo_redis.store.redis.blocking.HAS_HIREDIS", request.param == "hiredis")


@pytest.fixture
async def open_client() -> AsyncIterator[Callable[..., RedisClient]]:
    """Open clients, and close them after the test, also after one that fails."""
    opened: list[RedisClient] = []

    def open_one(url: str, timeout_s: float = TIMEOUT_S) -> RedisClient:
        opened.append(RedisClient(url, timeout_s=timeout_s))
        return opened[-1]

    yield open_one
    for client in opened:
        await client.aclose()


@pytest.fixture
async def open_streams(dynamo_redis_prefix: str) -> AsyncIterator[Callable[[str], RedisEventStreams]]:
    opened: list[RedisEventStreams] = []

    def open_one(url: str, timeout_s: float = TIMEOUT_S) -> RedisEventStreams:
        settings = StoreSettings.load(redis_url=url, prefix=dynamo_redis_prefix, command_timeout_s=timeout_s)
        opened.append(RedisEventStreams.from_settings(settings, EventSettings.load()))
        return opened[-1]

    yield open_one
    for streams in opened:
        await streams.aclose()


# --------------------------------------------------------------------------- one exchange


async def test_large_answer_arrives_over_a_slow_link(
    own_redis_server: EmbeddedServer, slow: Proxy, open_client: Callable[..., RedisClient]
) -> None:
    direct, client = open_client(own_redis_server.url, 3.0), open_client(slow.url)
    await direct.execute("SET", "large", content_of("x"))
    async with asyncio.timeout(WAIT_S):
        assert await client.execute("GET", "large") == content_of("x")
        assert await client.pipeline([("GET", "large"), ("ECHO", "y")]) == [content_of("x"), b"y"]


async def test_large_request_leaves_over_a_slow_link(
    own_redis_server: EmbeddedServer, slow: Proxy, open_client: Callable[..., RedisClient]
) -> None:
    direct, client = open_client(own_redis_server.url, 3.0), open_client(slow.url)
    async with asyncio.timeout(WAIT_S):
        await client.execute("SET", "large", content_of("x"))
    assert await direct.execute("GET", "large") == content_of("x")


@pytest.fixture
async def dripping() -> AsyncIterator[str]:
    """The URL of a peer that accepts logins as Redis does, and answers any other command by a byte at
    times."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while b"DRIP" not in (request := await reader.read(1000)) and request:
                writer.write(b"+OK\r\n" * request.count(b"\r\nCLIENT\r\n"))
            writer.write(b"$1000000\r\n")
            while request:
                await asyncio.sleep(0.01)
                writer.write(b"x")
                await writer.drain()
        except (OSError, RuntimeError):  # uvloop raises the latter on a closed transport
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_answer_that_drips_is_given_up(
    dripping: str,
    parser: None,
    open_client: Callable[..., RedisClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (deadline, blocking):
        monkeypatch.setattr(module, "LONGEST_TIMES", 3)
    limit_s = 0.5  # so long that a busy machine does not keep a byte back for all of it
    client, loop = open_client(dripping, limit_s), asyncio.get_running_loop()
    reader = client.blocking()
    async with asyncio.timeout(WAIT_S):
        for exchange in (client.execute("DRIP"), reader.execute(pack("DRIP"), block_s=0.0)):
            began_at = loop.time()
            with pytest.raises(StoreUnavailable, match="in time"):
                await exchange
            assert loop.time() - began_at >= 0.99 * 3 * limit_s
    await reader.aclose()


# --------------------------------------------------------------------------- the registry


async def test_large_changes_arrive_over_a_slow_link(
    own_redis_server: EmbeddedServer, slow: Proxy, open_registry: Any, mirror: Any, parser: None
) -> None:
    """Meanwhile a lease is renewed and values are written over the same link."""
    writer = await open_registry(own_redis_server.url)
    reader = await open_registry(slow.url, timeout_s=TIMEOUT_S)
    view = await mirror(reader, "k/")
    registered = await reader.register("own", content_of("registered"))
    state = {f"k/{n}": content_of(n) for n in range(3)}
    for key, value in state.items():
        await writer.put(key, value)
    await reader.put("k/own", content_of("own"))
    state["k/own"] = content_of("own")
    await view.until_state(state, WAIT_S)
    async with asyncio.timeout(WAIT_S):
        snapshot = await reader.get_prefix("k/")
    assert {record.key: record.value for record in snapshot.records} == state
    assert view.resyncs == []
    assert reader.lease_losses == 0
    assert registered.lost is None


async def test_pages_of_large_records_are_bounded(
    own_redis_server: EmbeddedServer, open_registry: Any
) -> None:
    registry = await open_registry(own_redis_server.url)
    small = [PutOp(f"k/{n:02}", b"small") for n in range(40)]
    await registry.transact([], small)
    for n in range(40, 46):
        await registry.put(f"k/{n:02}", content_of(n))
    page = await registry._kv._page("", "k/", b"")
    assert PAGE_BYTES < sum(map(len, page[7::2])) < PAGE_BYTES + MIB // 2
    keys = [f"k/{n:02}" for n in range(46)]
    owned = await registry._kv.read(keys)
    assert list(owned.records) == keys
    assert owned.records["k/45"].value == content_of(45)


# --------------------------------------------------------------------------- events


@pytest.mark.parametrize("kind", ["group", "tail"])
async def test_large_entries_are_read_over_a_slow_link(
    own_redis_server: EmbeddedServer, slow: Proxy, open_streams: Any, parser: None, kind: str
) -> None:
    publisher, streams = open_streams(own_redis_server.url, 3.0), open_streams(slow.url)
    reader = streams.group(STREAM, "router") if kind == "group" else streams.tail(STREAM, max_age_s=600.0)
    if kind == "group":
        await reader.create()
    contents = [content_of(n, MIB // 4) for n in range(12)]
    for content in contents:
        await publisher.append(STREAM, [NewEntry(content, 1)])
    entries: list[Entry] = []
    async with asyncio.timeout(WAIT_S):
        while len(entries) < len(contents):
            entries += await reader.read(count=1024, block_s=0.1)
    assert [entry.content for entry in entries] == contents
    await reader.aclose()


async def test_group_asks_for_less_after_a_page_that_never_came(
    own_redis_server: EmbeddedServer, slow: Proxy, open_streams: Any
) -> None:
    """The first page would take the link longer than the longest exchange."""
    publisher, streams = open_streams(own_redis_server.url, 3.0), open_streams(slow.url, 0.1)
    await open_streams(own_redis_server.url, 30.0).group(STREAM, "router").create()
    group = streams.group(STREAM, "router")
    contents = [content_of(n, MIB // 4) for n in range(10)]
    await publisher.append(STREAM, [NewEntry(content, 1) for content in contents])
    entries: list[Entry] = []
    failed_count = 0
    async with asyncio.timeout(WAIT_S):
        while len(entries) < len(contents):
            try:
                entries += await group.read(count=1024, block_s=0.0)
            except StoreUnavailable:
                failed_count += 1
    assert [entry.content for entry in entries] == contents
    assert failed_count > 0
    await group.aclose()


async def test_large_message_arrives_over_a_slow_link(
    own_redis_server: EmbeddedServer, slow: Proxy, open_streams: Any
) -> None:
    publisher, streams = open_streams(own_redis_server.url, 3.0), open_streams(slow.url)
    subscription = await streams.subscribe(STREAM)
    for seed in ("one", "two"):
        await publisher.publish(STREAM, content_of(seed))
    got: list[bytes] = []
    async with asyncio.timeout(WAIT_S):
        while len(got) < 2:
            message = await subscription.next(0.1)
            got += [message] if message is not None else []
    assert got == [content_of("one"), content_of("two")]
    await subscription.aclose()


# --------------------------------------------------------------------------- objects


async def test_object_goes_and_comes_over_a_slow_link(
    slow: Proxy, open_client: Callable[..., RedisClient], dynamo_redis_prefix: str
) -> None:
    objects = RedisObjectStore(open_client(slow.url), dynamo_redis_prefix)
    content = content_of("object", 2 * CHUNK_BYTES + 1)
    async with asyncio.timeout(WAIT_S):
        await objects.put("b", "n", content)
        assert await objects.read("b", "n") == content


async def test_same_content_is_sent_once_over_a_slow_link(
    slow: Proxy, open_client: Callable[..., RedisClient], dynamo_redis_prefix: str
) -> None:
    """Only one of several uploads sends a chunk, though that takes longer than a claim lives."""
    content, clients = content_of("object"), [open_client(slow.url) for _ in range(3)]
    uploads = [
        RedisObjectStore(client, dynamo_redis_prefix, times=ObjectTimes(claim_s=0.4)) for client in clients
    ]
    sent: list[int] = []
    for client in clients:
        _note_sizes(client, sent)
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*(objects.put("b", "n", content) for objects in uploads))
        assert await uploads[0].read("b", "n") == content
    assert sent == [len(content)]


def _note_sizes(client: StoreClient, sent: list[int]) -> None:
    """Record the size of each chunk that this client sends."""
    execute = client.execute

    async def noted(*command: Any, **options: Any) -> Any:
        if command[0] == "SET" and isinstance(command[2], bytes):
            sent.append(len(command[2]))
        return await execute(*command, **options)

    client.execute = noted  # type: ignore[method-assign]
