"""The keys that the last release left in Redis, under the present code."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable

import pytest
from tools.golden_store import CONTENT, STREAM, Dump, golden, load, make

from dynamo_redis.config import EventSettings, StoreSettings
from dynamo_redis.store.base import Locks, ObjectStore, Put, Registry, Revision
from dynamo_redis.store.connect import open_whole_store
from dynamo_redis.store.event_base import BEGINNING, EventStreams, NewEntry
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.opening import open_client

GOLDEN = golden()
Store = tuple[Registry, ObjectStore, Locks, EventStreams]


@pytest.fixture
async def client(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[StoreClient]:
    made = open_client(dynamo_redis_url, timeout_s=15.0)
    await load(made, dynamo_redis_prefix, GOLDEN)
    yield made
    await made.aclose()


@pytest.fixture
async def store(client: StoreClient, dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[Store]:
    """The store of a process that comes to the loaded deployment."""
    settings = StoreSettings.load(
        redis_url=dynamo_redis_url, prefix=dynamo_redis_prefix, command_timeout_s=15.0
    )
    opened = open_whole_store(settings, EventSettings.load())
    await opened[0].start()
    yield opened
    await opened[0].aclose()


def fields(stored: Dump, name: str) -> dict[str, str]:
    flat = stored[name][1]
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def test_its_registry_goes_on(client: StoreClient, store: Store, dynamo_redis_prefix: str) -> None:
    registry = store[0]
    meta = fields(GOLDEN, "{@}:meta")
    assert (await client.execute("HGET", f"{{{dynamo_redis_prefix}}}:meta", "inc")).decode() == meta["inc"]
    found = {record.key: record for record in (await registry.get_prefix("")).records}
    assert found.keys() == {"app/lasting", "v1/ports/h/1"}
    assert (found["app/lasting"].value, found["app/lasting"].version) == (bytes(range(256)), 2)
    assert found["v1/ports/h/1"].lease is not None
    (first, *_) = GOLDEN["{@}:log"][1]["entries"]
    seen: list[tuple[str, str]] = []
    async with registry.watch("app/", start_revision=Revision(first[0])) as watch:
        async for batch in watch:
            seen += [
                (type(each).__name__, each.record.key if isinstance(each, Put) else each.key)
                for each in batch.events
            ]
            if len(seen) == 4:
                break
    assert seen == [
        ("Put", "app/gone"),
        ("Put", "app/lasting"),
        ("Put", "app/lasting"),
        ("Delete", "app/gone"),
    ]
    await registry.compare_and_put("app/lasting", b"three", found["app/lasting"].mod_revision)
    changed = await registry.get("app/lasting")
    assert changed is not None
    assert (changed.version, changed.create_revision) == (3, found["app/lasting"].create_revision)


async def test_its_object_is_read_and_replaced(store: Store) -> None:
    objects = store[1]
    assert [(info.bucket, info.name) for info in await objects.list()] == [("models", "m/config.json")]
    assert await objects.read("models", "m/config.json") == CONTENT
    await objects.put("models", "m/config.json", b"new")
    assert await objects.read("models", "m/config.json") == b"new"


async def test_its_lock_is_held_by_a_higher_token(store: Store) -> None:
    lock = store[2].lock("name")
    value = await lock.read()
    assert value is not None
    assert value.value == b"protected"
    async with lock.hold(timeout_s=10.0) as held:
        assert held.fencing_token > value.fencing_token
        await held.write(b"new")


async def test_its_event_stream_goes_on(store: Store) -> None:
    streams = store[3]
    info = await streams.info(STREAM)
    assert info is not None
    assert (info.entry_count, info.event_count, info.size_bytes) == (2, 3, 11)
    assert [group.name for group in info.groups] == ["router"]
    await streams.append(STREAM, [NewEntry(b"third", 1)])
    group = streams.group(STREAM, "router")
    await group.seek(BEGINNING)
    entries = await group.read(count=10, block_s=1.0)
    assert [entry.content for entry in entries] == [b"first", b"second", b"third"]
    await group.aclose()


_NUMBERS = re.compile(r"[0-9a-f]{12,64}|\d{9,}")  # ids without their zeros in front may be shorter than 16


def parts(names: Iterable[str]) -> set[str]:
    """Return names without the ids and times in them."""
    return {_NUMBERS.sub("#", name) for name in names}


async def test_the_present_code_leaves_all_that_the_last_release_reads(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    now = await make(dynamo_redis_url, dynamo_redis_prefix)
    assert parts(now) >= parts(GOLDEN)
    for key, (kind, content) in GOLDEN.items():
        if _NUMBERS.search(key):
            continue
        assert now[key][0] == kind, key
        if kind == "hash":
            assert parts(fields(now, key)) >= parts(filter(str.isprintable, fields(GOLDEN, key))), key
        if kind == "stream":
            names = {name for _, flat in content["entries"] for name in flat[::2]}
            assert {name for _, flat in now[key][1]["entries"] for name in flat[::2]} >= names, key
