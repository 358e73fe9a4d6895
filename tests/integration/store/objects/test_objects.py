"""The object store on Redis: deaths, damage, expiry and costs."""

from __future__ import annotations

import asyncio
import hashlib
import re
import signal
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis import Redis

from dynamo_redis.child import ChildProcess
from dynamo_redis.errors import ObjectChanged, ObjectNotFound, SchemaMismatch, StoreRefused, StoreUnavailable
from dynamo_redis.store.keys import ObjectKeys
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.chunks import ObjectTimes
from dynamo_redis.store.objects.manifest import chunk_name
from dynamo_redis.store.objects.redis_objects import CHUNKS_UNDER_WAY_COUNT, RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.server import EmbeddedServer
from tests.processes import PROGRAMS

CHUNK_BYTES = 1000
CHUNKS = 6


class Killed(Exception):
    """Ends an upload at a chosen point."""


@pytest.fixture
async def objects(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[RedisObjectStore]:
    async with opened(dynamo_redis_url, dynamo_redis_prefix) as store:
        yield store


@pytest.fixture
def redis(dynamo_redis_url: str) -> Iterator[Redis]:
    """A client for changes of the same keys by hand."""
    with Redis.from_url(dynamo_redis_url) as client:
        yield client


@pytest.fixture
def keys(dynamo_redis_prefix: str) -> ObjectKeys:
    return ObjectKeys(dynamo_redis_prefix, "b", "n")


@asynccontextmanager
async def opened(
    url: str, prefix: str, *, chunk_bytes: int = CHUNK_BYTES, expiry_s: float = 600.0
) -> AsyncIterator[RedisObjectStore]:
    client = RedisClient(url, timeout_s=3.0)
    times = ObjectTimes(expiry_s=expiry_s, claim_s=0.1)
    store = RedisObjectStore(client, prefix, chunk_bytes=chunk_bytes, times=times)
    try:
        yield store
    finally:
        await store.aclose()


def content_of(seed: str, size_bytes: int = CHUNKS * CHUNK_BYTES - 1) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size_bytes)


def chunk_keys(keys: ObjectKeys, content: bytes) -> list[str]:
    ends = range(CHUNK_BYTES, len(content) + CHUNK_BYTES, CHUNK_BYTES)
    digests = [hashlib.sha256(content[:end]).hexdigest() for end in ends]
    return [keys.chunk(chunk_name(digest, CHUNK_BYTES)) for digest in digests]


def after(done_bytes: int, action: Callable[[], object]) -> Callable[[int, int | None], None]:
    """A progress callback that acts when that many bytes are done."""

    def progress(done: int, total: int | None) -> None:
        if done >= done_bytes:
            action()

    return progress


def die() -> None:
    raise Killed


# --------------------------------------------------------------------------- uploads that die


@pytest.mark.parametrize("after_chunks", range(1, CHUNKS + 1))
async def test_killed_uploader_leaves_old_object_and_expiring_chunks(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, after_chunks: int
) -> None:
    old, new = content_of("old"), content_of("new")
    await objects.put("b", "n", old)
    with pytest.raises(Killed):
        await objects.put("b", "n", new, progress=after(min(after_chunks * CHUNK_BYTES, len(new)), die))
    assert await objects.read("b", "n") == old
    assert [redis.pttl(key) for key in chunk_keys(keys, old)] == [-1] * CHUNKS
    left = [key for key in chunk_keys(keys, new) if redis.exists(key)]
    assert after_chunks <= len(left) < after_chunks + CHUNKS_UNDER_WAY_COUNT
    assert all(0 < int(redis.pttl(key)) <= 600_000 for key in left)
    await objects.put("b", "n", new)
    assert await objects.read("b", "n") == new


async def test_an_uploader_cancelled_anywhere_leaves_one_object_whole(
    objects: RedisObjectStore, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    old, new = content_of("old"), content_of("new")
    await objects.put("b", "n", old)
    for pause_s in [step * 0.0005 for step in range(20)]:
        with anyio.move_on_after(pause_s):
            await objects.put("b", "n", new)
        assert await objects.read("b", "n") in (old, new)
        await objects.put("b", "n", old)


_UPLOADER = PROGRAMS / "slow_uploader.py"


async def test_a_process_killed_while_it_uploads(
    objects: RedisObjectStore,
    dynamo_redis_url: str,
    dynamo_redis_prefix: str,
    redis: Redis,
    keys: ObjectKeys,
    tmp_path: Path,
) -> None:
    await objects.put("b", "n", b"old")
    chunk = chunk_keys(keys, bytes(1000))[0]
    with (tmp_path / "out").open("wb") as out:
        argv = [sys.executable, str(_UPLOADER), dynamo_redis_url, dynamo_redis_prefix]
        uploader = ChildProcess.start(argv, stdout=out)
    try:
        with anyio.fail_after(20):
            while not (tmp_path / "out").read_text() or not redis.exists(chunk):
                await anyio.sleep(0.02)
    finally:
        uploader.send_signal(signal.SIGKILL)
        await uploader.wait(5)
    assert await objects.read("b", "n") == b"old"
    assert 0 < int(redis.pttl(chunk)) <= 600_000


async def test_upload_gives_current_chunks_no_expiry(
    objects: RedisObjectStore,
    dynamo_redis_url: str,
    dynamo_redis_prefix: str,
    redis: Redis,
    keys: ObjectKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another upload of the same content ends between this upload's check of a chunk and its write."""
    content = content_of("x")
    execute = objects._client.execute

    async def late(*command: Any) -> Any:
        if command[0] == "SET" and not redis.exists(keys.current):
            async with opened(dynamo_redis_url, dynamo_redis_prefix) as other:
                await other.put("b", "n", content)
        return await execute(*command)

    monkeypatch.setattr(objects._client, "execute", late)
    with pytest.raises(Killed):
        await objects.put("b", "n", content, progress=after(1000, die))
    assert [redis.pttl(key) for key in chunk_keys(keys, content)] == [-1] * CHUNKS


async def test_a_slow_source_keeps_its_chunks_alive(dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    async with opened(dynamo_redis_url, dynamo_redis_prefix, expiry_s=3.0) as objects:
        content = content_of("slow")

        async def slow() -> AsyncIterator[bytes]:
            yield content[:2000]
            await anyio.sleep(4.0)
            yield content[2000:]

        await objects.put("b", "n", slow())
        assert await objects.read("b", "n") == content


async def test_chunks_lost_during_the_upload_are_sent_again(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys
) -> None:
    content = content_of("lost")
    loss = iter([lambda: redis.delete(*chunk_keys(keys, content)[:2])])
    await objects.put("b", "n", content, progress=after(3000, lambda: next(loss, int)()))
    assert await objects.read("b", "n") == content


async def test_pieces_cannot_be_sent_again_and_the_old_object_stays(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys
) -> None:
    content = content_of("lost")

    async def pieces() -> AsyncIterator[bytes]:
        yield content[:3000]
        redis.delete(*chunk_keys(keys, content)[:1])
        yield content[3000:]

    await objects.put("b", "n", b"old")
    with pytest.raises(StoreUnavailable, match="put the object again"):
        await objects.put("b", "n", pieces())
    assert await objects.read("b", "n") == b"old"


# --------------------------------------------------------------------------- replaced versions


async def test_replaced_chunks_expire_and_kept_ones_do_not(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys
) -> None:
    old = content_of("old")
    new = old[:3000] + content_of("new", 3000)
    await objects.put("b", "n", old)
    await objects.put("b", "n", new)
    assert [redis.pttl(key) for key in chunk_keys(keys, new)] == [-1] * 6
    assert all(0 < int(redis.pttl(key)) <= 601_000 for key in chunk_keys(keys, old)[3:])
    await objects.put("b", "n", old)  # chunks about to expire are kept again
    assert [redis.pttl(key) for key in chunk_keys(keys, old)] == [-1] * 6
    assert await objects.read("b", "n") == old
    await objects.remove("b", "n")
    at_once = redis.pipeline()
    for key in chunk_keys(keys, old):
        at_once.pttl(key)
    left_ms = at_once.execute()
    assert all(0 < left <= 601_000 for left in left_ms)
    assert left_ms == sorted(set(left_ms))  # not all of them at the same moment


async def test_reader_of_a_replaced_version_renews_unread_chunks(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    async with opened(dynamo_redis_url, dynamo_redis_prefix, expiry_s=3.0) as objects:
        old = content_of("old", 12 * CHUNK_BYTES)
        await objects.put("b", "n", old)
        reader = objects.get("b", "n")
        seen = await anext(reader)
        await objects.put("b", "n", b"new")
        async for chunk in reader:
            seen += chunk
            await anyio.sleep(0.5)
        assert seen == old


async def test_a_reader_that_stops_for_too_long_is_told(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    async with opened(dynamo_redis_url, dynamo_redis_prefix, expiry_s=2.0) as objects:
        await objects.put("b", "n", content_of("old"))
        reader = objects.get("b", "n")
        seen = await anext(reader)
        await objects.put("b", "n", b"new")
        await anyio.sleep(2.5)
        with pytest.raises(ObjectChanged, match=r"chunk \d of 6 is gone"):
            seen += b"".join([chunk async for chunk in reader])
        assert seen == content_of("old")[:CHUNK_BYTES]
        assert await objects.read("b", "n") == b"new"


# --------------------------------------------------------------------------- damage


async def test_a_damaged_chunk_is_seen_and_put_right_by_the_next_put(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, tmp_path: Path
) -> None:
    content = content_of("x")
    await objects.put("b", "n", content)
    redis.setrange(chunk_keys(keys, content)[3], 500, b"damage")
    with pytest.raises(ObjectChanged, match="chunk 3 of 6 is damaged"):
        await objects.read("b", "n")
    with pytest.raises(ObjectChanged):
        await objects.fetch("b", "n", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    await objects.put("b", "n", content)
    assert await objects.read("b", "n") == content
    assert [redis.pttl(key) for key in chunk_keys(keys, content)] == [-1] * CHUNKS


@pytest.mark.parametrize("damage", ["chunk gone", "chunk damaged", "manifest damaged"])
async def test_incomplete_object_is_detected_and_repaired_by_a_put(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, damage: str
) -> None:
    content = content_of("x")
    sha256 = hashlib.sha256(content).hexdigest()
    await objects.put("b", "n", content)
    if damage == "chunk gone":
        redis.delete(chunk_keys(keys, content)[3])
    elif damage == "manifest damaged":
        redis.hdel(keys.current, "chunk_bytes")
    else:
        redis.setrange(chunk_keys(keys, content)[3], 500, b"damage")
        with pytest.raises(ObjectChanged):
            await objects.read("b", "n")
    assert not await objects.holds("b", "n", sha256)
    await objects.put("b", "n", content)
    assert await objects.holds("b", "n", sha256)
    assert await objects.read("b", "n") == content


async def test_damaged_chunk_is_sent_exactly_once_more(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys
) -> None:
    content = content_of("x")
    await objects.put("b", "n", content)
    chunk = chunk_keys(keys, content)[3]
    redis.setrange(chunk, 500, b"damage")
    await objects.put("b", "n", content)  # not read, so the damage is unknown
    with pytest.raises(ObjectChanged, match="chunk 3 of 6 is damaged"):
        await objects.read("b", "n")
    assert redis.smembers(keys.damaged) == {chunk.removeprefix(keys.chunk("")).encode()}
    assert 0 < int(redis.ttl(keys.damaged)) <= 86_400
    await objects.put("b", "n", content)
    assert not redis.exists(keys.damaged)
    redis.append(chunk, b"what is of a wrong size needs no reader to be seen")
    await objects.put("b", "n", content)
    assert await objects.read("b", "n") == content
    assert [redis.pttl(key) for key in chunk_keys(keys, content)] == [-1] * CHUNKS


async def test_chunks_of_another_size_are_other_chunks(
    objects: RedisObjectStore, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    content = content_of("x")
    await objects.put("b", "n", content)
    async with opened(dynamo_redis_url, dynamo_redis_prefix, chunk_bytes=2 * CHUNK_BYTES) as other:
        reader = objects.get("b", "n")
        seen = await anext(reader)
        await other.put("b", "n", content + b"more")
        assert seen + b"".join([chunk async for chunk in reader]) == content
        assert await objects.read("b", "n") == content + b"more"


async def test_a_missing_chunk_is_seen_and_put_right_by_the_next_put(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys
) -> None:
    content = content_of("x")
    await objects.put("b", "n", content)
    redis.delete(chunk_keys(keys, content)[5])
    reader = objects.get("b", "n")
    for _ in range(5):
        await anext(reader)
    with pytest.raises(ObjectChanged, match="chunk 5 of 6 is gone"):
        await anext(reader)
    await objects.put("b", "n", content)
    assert await objects.read("b", "n") == content


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunks", "0" * 64),
        ("chunks", ""),
        ("size_bytes", "1"),
        ("size_bytes", "many"),
        ("sha256", "0" * 64),
        ("version", None),
    ],
)
async def test_damaged_manifest_is_detected_and_replaced_by_next_put(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, field: str, value: str | None
) -> None:
    content = content_of("x")
    await objects.put("b", "n", content)
    if value is None:
        redis.hdel(keys.current, field)
    else:
        redis.hset(keys.current, field, value)
    with pytest.raises(ObjectChanged, match="its manifest is damaged"):
        await objects.read("b", "n")
    await objects.put("b", "n", content)
    assert await objects.read("b", "n") == content


async def test_swapped_chunks_are_seen(objects: RedisObjectStore, redis: Redis, keys: ObjectKeys) -> None:
    await objects.put("b", "n", content_of("x", 2000))
    first, second = str(redis.hget(keys.current, "chunks"), "ascii").split()  # type: ignore[arg-type]
    redis.hset(keys.current, "chunks", f"{second} {first}")
    with pytest.raises(ObjectChanged, match="its manifest is damaged"):
        await objects.read("b", "n")


async def test_list_leaves_out_unreadable_objects(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("n", "good", "torn"):
        await objects.put("b", name, content_of("x"))
    index = f"{{{keys.prefix}/object}}:names"
    redis.zadd(index, {b"\xff\xfe": 1, b"no bucket": 1, b"/": 1})
    redis.set(keys.current, "a string")
    redis.hset(ObjectKeys(keys.prefix, "b", "torn").current, "size_bytes", "many")
    assert [info.name for info in await objects.list()] == ["good"]
    assert caplog.text.count("left out of the list: ") == 5
    assert f"{keys.current} is a string and should be a hash: `redis-cli DEL" in caplog.text


async def test_fetch_starts_over_once(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, tmp_path: Path
) -> None:
    content = content_of("x")
    await objects.put("b", "n", content)
    key = chunk_keys(keys, content)[2]
    # The chunk goes away before the first try reaches it, and is back before the second one does.
    renames = iter([(key, key + "x"), None, (key + "x", key)])

    def rename(done_bytes: int, size_bytes: int | None) -> None:
        if names := next(renames, None):
            redis.rename(*names)

    await objects.fetch("b", "n", tmp_path / "file", progress=rename)
    assert next(renames, "used up") == "used up"
    assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


async def test_a_newer_releases_object_is_neither_read_nor_replaced(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys
) -> None:
    await objects.put("b", "n", b"x")
    redis.hset(keys.current, "later_releases_field", "kept")
    assert await objects.read("b", "n") == b"x"
    redis.hset(keys.current, "v", "2")
    for call in (objects.read("b", "n"), objects.put("b", "n", b"y"), objects.remove("b", "n")):
        with pytest.raises(SchemaMismatch, match="schema version 2 "):
            await call
    redis.hset(keys.current, mapping={"v": "1", "codec": "zstd"})
    with pytest.raises(SchemaMismatch, match="codec zstd"):
        await objects.read("b", "n")
    redis.hset(keys.current, mapping={"codec": "none", "digest": "blake3"})
    for call in (objects.read("b", "n"), objects.put("b", "n", b"y"), objects.remove("b", "n")):
        with pytest.raises(SchemaMismatch, match="digest blake3"):
            await call
    assert await objects.list() == []  # with a warning


# --------------------------------------------------------------------------- index


async def test_every_object_is_listed_even_if_its_put_ended_in_a_crash(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, dynamo_redis_prefix: str
) -> None:
    names = f"{{{dynamo_redis_prefix}/object}}:names"
    redis.zadd(names, {"b/started": time.time(), "b/long%20ago": time.time() - 4000})
    await objects.put("b", "n", b"x")
    assert [info.name for info in await objects.list()] == ["n"]
    # The name of a put that is under way must stay; it becomes current a moment later.
    assert sorted(redis.zrange(names, 0, -1)) == [b"b/n", b"b/started"]


async def test_an_objects_keys_share_one_hash_tag(
    objects: RedisObjectStore, redis: Redis, dynamo_redis_prefix: str
) -> None:
    await objects.put("b {x}", "n/{y}", content_of("x"))
    keys = {key.decode() for key in redis.scan_iter(f"{{{dynamo_redis_prefix}*")}
    tag = f"{{{dynamo_redis_prefix}/object/b%20%7Bx%7D/n%2F%7By%7D}}"
    kinds = [key.removeprefix(tag).split(":")[1] for key in keys if key.startswith(tag)]
    assert {kind: kinds.count(kind) for kind in kinds if kind != "claim"} == {
        "current": 1,
        "done": 1,
        "chunk": CHUNKS,
    }
    assert {key for key in keys if not key.startswith(tag)} == {f"{{{dynamo_redis_prefix}/object}}:names"}


async def test_object_is_listed_if_its_put_dies_after_the_commit(
    objects: RedisObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script = objects._client.script

    async def script(script: Script, *arguments: Any) -> Any:
        answer = await run_script(script, *arguments)
        if script.name == "object_commit":
            raise Killed
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(objects._client, "script", script)
        with pytest.raises(Killed):
            await objects.put("b", "n", b"x")
    assert await objects.read("b", "n") == b"x"
    assert [info.name for info in await objects.list()] == ["n"]


# --------------------------------------------------------------------------- cost


async def test_the_same_content_is_sent_once(
    own_redis_server: EmbeddedServer, dynamo_redis_prefix: str
) -> None:
    async with opened(own_redis_server.url, dynamo_redis_prefix, chunk_bytes=20_000) as objects:
        content = content_of("x", 200_000)
        with Redis.from_url(own_redis_server.url) as redis:

            def received_bytes() -> int:
                return int(redis.info("stats")["total_net_input_bytes"])

            before = received_bytes()
            await objects.put("b", "n", content)
            between = received_bytes()
            await objects.put("b", "n", content)
            assert between - before > 200_000
            assert received_bytes() - between < 20_000  # keys and digests


async def test_a_large_object_takes_constant_memory(
    objects: RedisObjectStore, dynamo_redis_url: str, dynamo_redis_prefix: str, redis: Redis
) -> None:
    size_bytes = 64 << 20

    async def pieces() -> AsyncIterator[bytes]:
        for n in range(size_bytes // 65536):
            yield n.to_bytes(4, "big") * 16384

    async with opened(dynamo_redis_url, dynamo_redis_prefix, chunk_bytes=1 << 20) as store:
        tracemalloc.start()
        try:
            info = await store.put("big", "n", pieces())
            digest = hashlib.sha256()
            async for chunk in store.get("big", "n"):
                digest.update(chunk)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert info.size_bytes == size_bytes
    assert digest.hexdigest() == info.sha256
    assert peak_bytes < 12 << 20
    redis.delete(*redis.scan_iter(f"{{{dynamo_redis_prefix}/object/big/*"))


async def test_a_server_that_is_full_refuses_and_keeps_the_old_object(
    own_redis_server: EmbeddedServer, dynamo_redis_prefix: str
) -> None:
    async with opened(own_redis_server.url, dynamo_redis_prefix) as objects:
        await objects.put("b", "n", b"old")
        with Redis.from_url(own_redis_server.url) as redis:
            redis.config_set("maxmemory", "3mb")
            with pytest.raises(StoreRefused, match="out of memory"):
                await objects.put("b", "n", content_of("x", 4 << 20))
            assert await objects.read("b", "n") == b"old"


async def test_writers_of_different_content_all_succeed_and_one_stays(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys
) -> None:
    versions = {n: content_of(str(n)) for n in range(8)}
    await asyncio.gather(*[objects.put("b", "n", content) for content in versions.values()])
    winner = await objects.read("b", "n")
    assert winner in versions.values()
    for content in versions.values():
        expected = [-1] if content == winner else range(1, 601_001)
        assert all(redis.pttl(key) in expected for key in chunk_keys(keys, content))


async def test_object_survives_a_restart_but_not_loss_of_data(
    own_redis_server: EmbeddedServer, dynamo_redis_prefix: str
) -> None:
    async with opened(own_redis_server.url, dynamo_redis_prefix) as objects:
        content = content_of("x")
        info = await objects.put("b", "n", content)
        await own_redis_server.restart()
        with anyio.fail_after(15):
            while await objects_or_none(objects) != content:
                await anyio.sleep(0.05)
        assert await objects.info("b", "n") == info
        await own_redis_server.restart(keep_data=False)
        with anyio.fail_after(15):
            while True:
                try:
                    await objects.read("b", "n")
                except ObjectNotFound:
                    break
                except StoreUnavailable:
                    await anyio.sleep(0.05)
        await objects.put("b", "n", content)
        assert await objects.read("b", "n") == content


async def objects_or_none(objects: RedisObjectStore) -> bytes | None:
    try:
        return await objects.read("b", "n")
    except StoreUnavailable:
        return None


async def test_the_documented_keys_and_fields_are_those_in_redis(
    objects: RedisObjectStore, redis: Redis, keys: ObjectKeys, dynamo_redis_prefix: str, repository: Path
) -> None:
    client, times = objects._client, ObjectTimes(claim_s=60.0)  # so that claims are still there
    writer = RedisObjectStore(client, dynamo_redis_prefix, chunk_bytes=CHUNK_BYTES, times=times)
    async with RedisLocks(client, dynamo_redis_prefix).object_lock("b", "n").hold() as held:
        await writer.put("b", "n", content_of("x"), fence=held)
    text = (repository / "docs" / "redis-schema.md").read_text()
    section = text.partition("\n## Objects\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    documented = {row.replace("*tag*", "tag").replace("`", "") for row in rows} - {"key", "field", "---"}

    tag = keys.current.removesuffix(":current")
    names = {key.decode() for key in redis.scan_iter(f"{{{dynamo_redis_prefix}*")} - {f"{tag}:fence"}
    names |= {keys.damaged}  # the one that only a reader of a damaged object writes
    chunk = re.compile(r"\d+:[0-9a-f]{64}$")
    shapes = {chunk.sub("<chunk_bytes>:<sha256>", name.replace(tag, "tag")) for name in names}
    shapes = {re.sub(r":done:[0-9a-f]{16}$", ":done:<version>", shape) for shape in shapes}
    shapes = {shape.replace(dynamo_redis_prefix, "prefix") for shape in shapes}
    fields = {field if isinstance(field, str) else field.decode() for field in redis.hgetall(keys.current)}
    assert documented == shapes | fields
