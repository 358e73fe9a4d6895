"""Garbage collection on each kind of server: what no process needs goes, and nothing else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from dynamo_redis.config import EventSettings
from dynamo_redis.store.base import Record, Revision, Snapshot
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.garbage.collector import Buckets, Collector
from dynamo_redis.store.garbage.in_use import InUse
from dynamo_redis.store.garbage.survey import Kind, Survey
from dynamo_redis.store.keys import LockKeys, ObjectKeys, StreamKeys
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.streams.redis_streams import RedisEventStreams
from tests.contract.conftest import CLUSTER, SERVERS

CHUNK_BYTES = 1000
GRACE_S = 3600.0
OLD_MS = 2 * 3_600_000
"""Age of what is old: twice the grace."""
LIVE = StreamName("dynamo", "backend", "kv_events")
LEFT = StreamName("dynamo", "left", "kv_events")


@dataclass
class Deployment:
    """The store of one deployment, and the collector of its garbage."""

    client: StoreClient
    prefix: str

    def __post_init__(self) -> None:
        self.objects = RedisObjectStore(self.client, self.prefix, chunk_bytes=CHUNK_BYTES)
        self.streams = RedisEventStreams(self.client, self.prefix, EventSettings.load())
        self.locks = RedisLocks(self.client, self.prefix)
        buckets = Buckets("models", "kv_snapshots")
        self.collector = Collector(self.client, self.prefix, buckets, grace_s=GRACE_S)
        self.cards: list[str] = []

    def in_use(self) -> InUse:
        """Return what a registry with an instance of `dynamo.backend` and the cards names."""
        records = [record("v1/instances/dynamo/backend/generate/1", {})]
        records += (
            record(f"v1/mdc/dynamo/backend/generate/{number}", {"files": {"x": {"url": url}}})
            for number, url in enumerate(self.cards)
        )
        return InUse.of_snapshot(Snapshot(tuple(records), Revision("1-1")))

    async def collect(self) -> tuple[Survey, int]:
        """Remove all garbage. Return the survey, and how much went."""
        survey = await self.collector.survey(self.in_use())
        return survey, sum([await self.collector.remove(finding) for finding in survey.findings])

    async def put(self, bucket: str, name: str, content: bytes, *, is_old: bool = True) -> ObjectKeys:
        await self.objects.put(bucket, name, content)
        keys = ObjectKeys(self.prefix, bucket, name)
        if is_old:
            then = now_ms() - OLD_MS
            await self.client.execute("HSET", keys.current, "created_at_ms", then, "put_at_ms", then)
        return keys

    async def add_stream(self, name: StreamName) -> StreamKeys:
        """A stream whose only entry is old."""
        keys = StreamKeys(self.prefix, name)
        await self.client.execute("XADD", keys.events, f"{now_ms() - OLD_MS}-1", "c", b"x")
        await self.client.execute("RPUSH", keys.sizes, "1 1")
        await self.client.execute("HSET", keys.meta, "v", "1", "events", 1, "bytes", 1)
        return keys

    async def exists(self, *keys: str) -> list[bool]:
        return [bool(await self.client.execute("EXISTS", key)) for key in keys]


def record(key: str, value: object) -> Record:
    return Record(key, json.dumps(value).encode(), Revision("1-1"), Revision("1-1"), 1, None)


def now_ms() -> int:
    return round(time.time() * 1000)


@pytest.fixture(params=[*SERVERS, CLUSTER])
async def deployment(
    request: pytest.FixtureRequest, server_urls: Callable[[str], str], dynamo_redis_prefix: str
) -> AsyncIterator[Deployment]:
    client = open_client(server_urls(request.param), timeout_s=15.0)
    yield Deployment(client, dynamo_redis_prefix)
    await client.aclose()


async def test_garbage_of_each_kind_goes(deployment: Deployment) -> None:
    execute = deployment.client.execute
    model = await deployment.put("models", "gone/1/config.json", bytes(2500))
    snapshot = await deployment.put("kv_snapshots", LEFT.path, b"index")
    orphan = model.chunk("1000:" + "a" * 64)
    await execute("SET", orphan, b"x" * 7)
    temporary = ObjectKeys(deployment.prefix, "models", "y").damaged
    await execute("SADD", temporary, "x")
    inbox = f"{{{deployment.prefix}/plane/replies/default/caller-1}}:inbox"
    await execute("XADD", inbox, "*", "f", "x")
    fences = [
        LockKeys.of_name(deployment.prefix, "old").fence,
        LockKeys.of_object(deployment.prefix, "kv_snapshots", LEFT.path).fence,
    ]
    for fence in fences:
        await execute("SET", fence, (now_ms() - OLD_MS) * 1000)
    stream = await deployment.add_stream(LEFT)
    # Shown first, and nothing is written.
    survey = await deployment.collector.survey(deployment.in_use())
    found = {kind: sum(finding.count for finding in survey.of_kind(kind)) for kind in Kind}
    assert found == {
        Kind.MODEL_FILES: 1,
        Kind.SNAPSHOTS: 1,
        Kind.CHUNKS: 1,
        Kind.TEMPORARY: 2,
        Kind.LOCKS: 2,
        Kind.STREAMS: 1,
    }
    assert survey.of_kind(Kind.MODEL_FILES)[0].size_bytes == 2500
    assert survey.of_kind(Kind.CHUNKS)[0].size_bytes == 7
    assert all(await deployment.exists(model.current, snapshot.current, orphan, stream.events, *fences))
    assert await execute("PTTL", orphan) == -1
    # Then removed.
    _, removed_count = await deployment.collect()
    assert removed_count == 8
    gone = (model.current, snapshot.current, *fences, *stream.all)
    assert not any(await deployment.exists(*gone))
    for expiring in (orphan, temporary, inbox):
        assert 0 < await execute("PTTL", expiring) <= 86_400_000
    again, removed_count = await deployment.collect()
    assert (again.findings, removed_count, again.unreadable) == ([], 0, [])


async def test_what_lives_stays(deployment: Deployment) -> None:
    execute = deployment.client.execute
    named = await deployment.put("models", "served/1/config.json", bytes(2500))
    deployment.cards = ["redis-object://models/served/1/config.json"]
    live = [
        named.current,
        (await deployment.put("models", "new/1/config.json", b"new", is_old=False)).current,
        (await deployment.put("adapters", "fr", b"own")).current,
        (await deployment.put("kv_snapshots", LIVE.path, b"index")).current,
        *(await deployment.add_stream(LIVE)).all[:2],
    ]
    # A stream of a component that has left, to which a router still gives signs of life.
    watched = await deployment.add_stream(StreamName("dynamo", "watched", "kv_events"))
    await deployment.streams.group(StreamName("dynamo", "watched", "kv_events"), "g").create()
    await deployment.streams.append(StreamName("dynamo", "busy", "kv_events"), [NewEntry(b"x", 1)])
    busy = StreamKeys(deployment.prefix, StreamName("dynamo", "busy", "kv_events"))
    # A lock that is held, and one that protects a value; both were acquired long ago.
    held = LockKeys.of_name(deployment.prefix, "held")
    valued = LockKeys.of_name(deployment.prefix, "valued")
    for lock in (held, valued):
        await execute("SET", lock.fence, (now_ms() - OLD_MS) * 1000)
    await execute("HSET", held.lock, "owner", "x")
    await execute("HSET", valued.value, "value", "x")
    live += [*watched.all, busy.events, held.fence, held.lock, valued.fence, valued.value]
    survey, removed_count = await deployment.collect()
    assert (survey.findings, removed_count, survey.unknown_count) == ([], 0, 0)
    assert survey.other_objects_count == 1
    assert all(await deployment.exists(*live))
    assert await deployment.objects.read("models", "served/1/config.json") == bytes(2500)


async def test_an_upload_under_way_is_completed(deployment: Deployment) -> None:
    middle, go_on = asyncio.Event(), asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(3500)
        middle.set()
        await go_on.wait()
        yield b"end"

    # Its first chunks are those of an old version that no record names, so that it counts on them.
    old = await deployment.put("models", "m", bytes(3500))
    async with asyncio.TaskGroup() as group:
        put = group.create_task(deployment.objects.put("models", "m", pieces()))
        await middle.wait()
        survey, removed_count = await deployment.collect()
        assert [finding.kind for finding in survey.findings] == [Kind.MODEL_FILES]
        assert removed_count == 1
        assert await deployment.exists(old.current) == [False]
        go_on.set()
    assert put.result().size_bytes == 3503
    assert await deployment.objects.read("models", "m") == bytes(3500) + b"end"
    _, removed_count = await deployment.collect()
    assert removed_count == 0


async def test_what_comes_to_life_after_the_survey_stays(deployment: Deployment) -> None:
    """Each step of a starting process is made between the survey and the removals."""
    model = await deployment.put("models", "m/1/config.json", b"same")
    snapshot = await deployment.put("kv_snapshots", LEFT.path, b"index")
    stream = await deployment.add_stream(LEFT)
    lock = LockKeys.of_name(deployment.prefix, "old")
    await deployment.client.execute("SET", lock.fence, (now_ms() - OLD_MS) * 1000)
    valued = LockKeys.of_name(deployment.prefix, "valued")
    await deployment.client.execute("SET", valued.fence, (now_ms() - OLD_MS) * 1000)
    orphan = model.chunk("1000:" + "a" * 64)
    await deployment.client.execute("SET", orphan, b"x")
    survey = await deployment.collector.survey(deployment.in_use())
    assert len(survey.findings) == 6
    await deployment.client.execute("HSET", valued.value, "value", "x")
    await deployment.objects.put("models", "m/1/config.json", b"same")  # by a worker, before its card
    await deployment.streams.group(LEFT, "router").create()
    named = deployment.locks.lock("old")
    of_snapshot = deployment.locks.object_lock("kv_snapshots", LEFT.path)
    async with named.hold(timeout_s=5.0), of_snapshot.hold(timeout_s=5.0):
        await deployment.client.execute("HSET", model.current, "chunks", "b" * 64 + " " + "a" * 64)
        removed = [await deployment.collector.remove(finding) for finding in survey.findings]
    assert removed == [0] * 6
    assert await deployment.client.execute("PTTL", orphan) == -1
    stays = (model.current, snapshot.current, stream.events, lock.fence, valued.fence, orphan)
    assert all(await deployment.exists(*stays))


async def test_unknown_keys_are_named_and_stay(deployment: Deployment) -> None:
    prefix = deployment.prefix
    strange = [
        f"{{{prefix}}}:later",
        f"{{{prefix}/object/models/m}}:notes",
        f"{{{prefix}/object/models}}:current",
        f"{{{prefix}/cache/x}}:value",
        f"{{{prefix}/a/b/c/x}}:events",
    ]
    others = [f"{{{prefix}2}}:meta", f"{prefix}:x", f"{{{prefix}x/object/models/m}}:current"]
    for key in (*strange, *others):
        await deployment.client.execute("SET", key, b"x")
    survey, removed_count = await deployment.collect()
    assert (sorted(survey.unknown), survey.unknown_count) == (sorted(strange), len(strange))
    assert (survey.keys_count, removed_count) == (len(strange), 0)
    assert all(await deployment.exists(*strange, *others))


async def test_what_cannot_be_read_keeps_what_it_may_name(deployment: Deployment) -> None:
    model = await deployment.put("models", "m", b"x")
    wrong = StreamKeys(deployment.prefix, LEFT)
    await deployment.client.execute("SET", wrong.events, b"no stream")
    card = Record("v1/mdc/d/b/g/1", b"\xff{", Revision("1-1"), Revision("1-1"), 1, None)
    in_use = InUse.of_snapshot(Snapshot((card,), Revision("1-1")))
    survey = await deployment.collector.survey(in_use)
    assert survey.findings == []
    assert len(survey.unreadable) == 2
    assert wrong.events in survey.unreadable[1]
    assert await deployment.exists(model.current, wrong.events) == [True, True]
