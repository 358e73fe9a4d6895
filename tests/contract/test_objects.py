"""The contract of object stores, on each implementation."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dynamo_redis.errors import LockLost, ObjectNotFound
from dynamo_redis.store.base import HeldLock, ObjectInfo, ObjectStore, parse_object_url
from dynamo_redis.store.keys import LockKeys
from dynamo_redis.store.locks.lock import StoredLocks
from dynamo_redis.store.locks.memory import MemoryLocks
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.memory import MemoryObjectStore
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.opening import open_client
from tests.contract.conftest import CLUSTER

CHUNK_BYTES = 1000


@pytest.fixture
def url(request: pytest.FixtureRequest, server_urls: Callable[[str], str]) -> str:
    """Address of the server that the test is for."""
    if request.node.callspec.params["locks"] == CLUSTER:
        return server_urls(CLUSTER)
    return str(request.getfixturevalue("dynamo_redis_url"))


@pytest.fixture(params=["memory", "redis", CLUSTER])
async def locks(request: pytest.FixtureRequest, dynamo_redis_prefix: str) -> AsyncIterator[StoredLocks]:
    """The locks of fenced puts to `objects`."""
    found: StoredLocks
    if request.param == "memory":
        found = MemoryLocks()
    else:
        client = open_client(request.getfixturevalue("url"), timeout_s=3.0)
        found = RedisLocks(client, dynamo_redis_prefix)
    yield found
    await found.aclose()


@pytest.fixture
async def objects(
    request: pytest.FixtureRequest, locks: StoredLocks, dynamo_redis_prefix: str
) -> AsyncIterator[ObjectStore]:
    """An empty store with chunks of 1000 bytes."""
    store: ObjectStore
    if isinstance(locks, MemoryLocks):
        store = MemoryObjectStore(chunk_bytes=CHUNK_BYTES, locks=locks)
    else:
        client = open_client(request.getfixturevalue("url"), timeout_s=3.0)
        store = RedisObjectStore(client, dynamo_redis_prefix, chunk_bytes=CHUNK_BYTES)
    yield store
    await store.aclose()


def content_of(size_bytes: int, seed: str = "") -> bytes:
    return hashlib.shake_128(f"{seed}/{size_bytes}".encode()).digest(size_bytes)


async def pieces(content: bytes, size_bytes: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size_bytes):
        yield content[start : start + size_bytes]


@pytest.mark.parametrize("size_bytes", [0, 1, 999, 1000, 1001, 2000, 12_345])
async def test_content_comes_back_whole_and_described(objects: ObjectStore, size_bytes: int) -> None:
    content = content_of(size_bytes)
    info = await objects.put("bucket", "name", content)
    assert info.size_bytes == size_bytes
    assert info.sha256 == hashlib.sha256(content).hexdigest()
    assert info.chunk_count == -(-size_bytes // CHUNK_BYTES)
    assert info.url == "redis-object://bucket/name"
    assert await objects.read("bucket", "name") == content
    assert await objects.info("bucket", "name") == info
    assert await objects.list() == [info]


async def test_bytes_files_and_pieces_make_the_same_object(objects: ObjectStore, tmp_path: Path) -> None:
    content = content_of(5500)
    (tmp_path / "file").write_bytes(content)
    infos: list[ObjectInfo] = [
        await objects.put("b", "bytes", content),
        await objects.put("b", "file", tmp_path / "file"),
        *[await objects.put("b", f"pieces {n}", pieces(content, n)) for n in (1, 7, 1000, 1500, 6000)],
    ]
    assert {(info.size_bytes, info.sha256, info.chunk_count) for info in infos} == {
        (5500, hashlib.sha256(content).hexdigest(), 6)
    }
    for info in infos:
        assert await objects.read(info.bucket, info.name) == content


async def test_get_yields_chunks_in_order(objects: ObjectStore) -> None:
    content = content_of(2500)
    await objects.put("b", "n", content)
    chunks = [chunk async for chunk in objects.get("b", "n")]
    assert [len(chunk) for chunk in chunks] == [1000, 1000, 500]
    assert b"".join(chunks) == content


async def test_repeated_chunks(objects: ObjectStore) -> None:
    content = bytes(10 * CHUNK_BYTES) + b"end"
    assert (await objects.put("b", "n", content)).chunk_count == 11
    assert await objects.read("b", "n") == content


async def test_a_put_replaces(objects: ObjectStore) -> None:
    first = await objects.put("b", "n", content_of(3000, "first"))
    second = await objects.put("b", "n", content_of(1500, "second"))
    assert first.sha256 != second.sha256
    assert await objects.info("b", "n") == second
    assert await objects.read("b", "n") == content_of(1500, "second")
    assert await objects.list() == [second]


async def test_the_same_content_again_changes_nothing(objects: ObjectStore) -> None:
    info = await objects.put("b", "n", content_of(3000))
    assert await objects.put("b", "n", content_of(3000)) == info


async def test_a_reader_across_a_replace_sees_the_old_object_whole(objects: ObjectStore) -> None:
    old, new = content_of(5000, "old"), content_of(5000, "new")
    await objects.put("b", "n", old)
    reader = objects.get("b", "n")
    seen = await anext(reader)
    await objects.put("b", "n", new)
    seen += b"".join([chunk async for chunk in reader])
    assert seen == old
    assert await objects.read("b", "n") == new


async def test_a_reader_across_a_removal_sees_the_object_whole(objects: ObjectStore) -> None:
    content = content_of(5000)
    await objects.put("b", "n", content)
    reader = objects.get("b", "n")
    seen = await anext(reader)
    assert await objects.remove("b", "n")
    assert seen + b"".join([chunk async for chunk in reader]) == content
    with pytest.raises(ObjectNotFound):
        await objects.read("b", "n")


async def test_readers_among_writers_see_one_version_each(objects: ObjectStore) -> None:
    versions = [content_of(8000, str(n)) for n in range(6)]
    await objects.put("b", "n", versions[0])

    async def write() -> None:
        for version in versions:
            await objects.put("b", "n", version)

    async def read() -> None:
        for _ in range(8):
            assert await objects.read("b", "n") in versions

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(write())
        for _ in range(3):
            group.create_task(read())
    assert await objects.read("b", "n") in versions


async def test_puts_of_the_same_content_at_once(objects: ObjectStore) -> None:
    content = content_of(20_000)
    infos = await asyncio.gather(*[objects.put("b", "n", content) for _ in range(5)])
    assert {info.sha256 for info in infos} == {hashlib.sha256(content).hexdigest()}
    assert await objects.read("b", "n") == content


async def test_an_object_that_is_not_there(objects: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="no such object: redis-object://b/absent"):
        await objects.read("b", "absent")
    with pytest.raises(ObjectNotFound):
        await anext(objects.get("b", "absent"))
    with pytest.raises(ObjectNotFound):
        await objects.fetch("b", "absent", tmp_path / "file")
    assert await objects.info("b", "absent") is None
    assert await objects.remove("b", "absent") is False
    assert await objects.list() == []
    assert list(tmp_path.iterdir()) == []


async def test_list_is_ordered_and_by_bucket(objects: ObjectStore) -> None:
    for bucket, name in [("b", "2"), ("a", "9"), ("b", "1"), ("bb", "0")]:
        await objects.put(bucket, name, b"x")
    names = [(info.bucket, info.name) for info in await objects.list()]
    assert names == [("a", "9"), ("b", "1"), ("b", "2"), ("bb", "0")]
    assert [info.name for info in await objects.list("b")] == ["1", "2"]
    assert await objects.list("none") == []


async def test_remove(objects: ObjectStore) -> None:
    await objects.put("b", "n", content_of(2500))
    assert await objects.remove("b", "n") is True
    assert await objects.remove("b", "n") is False
    assert await objects.list() == []
    await objects.put("b", "n", content_of(2500))
    assert await objects.read("b", "n") == content_of(2500)


async def test_store_tells_whether_it_holds_a_content(objects: ObjectStore) -> None:
    content = content_of(2500)
    sha256 = hashlib.sha256(content).hexdigest()
    assert not await objects.holds("b", "n", sha256)
    await objects.put("b", "n", content)
    assert await objects.holds("b", "n", sha256)
    await objects.put("b", "n", b"")
    assert not await objects.holds("b", "n", sha256)
    assert await objects.holds("b", "n", hashlib.sha256().hexdigest())
    await objects.remove("b", "n")
    assert not await objects.holds("b", "n", hashlib.sha256().hexdigest())


async def test_names_of_all_kinds_are_kept_apart(objects: ObjectStore) -> None:
    names = ["a/b", "a", "a/b/tokenizer.json", "ü 日本 🦙", "{tag}", "a%2Fb", "*", "x:current", "\n"]
    for name in names:
        await objects.put("b}{", name, name.encode())
    for name in names:
        assert await objects.read("b}{", name) == name.encode()
    listed = await objects.list("b}{")
    assert [info.name for info in listed] == sorted(names)
    for info in listed:
        assert parse_object_url(info.url) == ("b}{", info.name)


@pytest.mark.parametrize(("bucket", "name"), [("", "n"), ("b", "")])
async def test_empty_names_are_refused(objects: ObjectStore, bucket: str, name: str) -> None:
    with pytest.raises(ValueError, match="a bucket and a name"):
        await objects.put(bucket, name, b"x")
    with pytest.raises(ValueError, match="a bucket and a name"):
        await objects.info(bucket, name)


async def test_fetch_writes_a_file_and_reports_progress(objects: ObjectStore, tmp_path: Path) -> None:
    content = content_of(2500)
    info = await objects.put("b", "n", content)
    path = tmp_path / "out"
    path.write_text("what was there before")
    seen: list[tuple[int, int | None]] = []
    assert await objects.fetch("b", "n", path, progress=lambda *step: seen.append(step)) == info
    assert path.read_bytes() == content
    assert seen == [(1000, 2500), (2000, 2500), (2500, 2500)]
    assert list(tmp_path.iterdir()) == [path]


async def test_fetch_into_a_directory_that_is_not_there(objects: ObjectStore, tmp_path: Path) -> None:
    await objects.put("b", "n", b"x")
    with pytest.raises(FileNotFoundError):
        await objects.fetch("b", "n", tmp_path / "absent" / "file")


async def test_put_reports_progress(objects: ObjectStore, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    (tmp_path / "file").write_bytes(content_of(1500))
    await objects.put("b", "n", tmp_path / "file", progress=lambda *step: seen.append(step))
    await objects.put("b", "m", pieces(content_of(1500), 300), progress=lambda *step: seen.append(step))
    assert seen == [(1000, 1500), (1500, 1500), (1000, None), (1500, None)]


async def test_a_source_that_fails_leaves_the_old_object(objects: ObjectStore, tmp_path: Path) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield content_of(1500)
        raise RuntimeError("the source broke")

    await objects.put("b", "n", b"old")
    with pytest.raises(RuntimeError, match="the source broke"):
        await objects.put("b", "n", failing())
    with pytest.raises(FileNotFoundError):
        await objects.put("b", "n", tmp_path / "absent")
    assert await objects.read("b", "n") == b"old"


# --------------------------------------------------------------------------- fenced by a lock


@dataclass
class Claimed:
    """A lock that its user takes for held."""

    name: str
    owner: str
    fencing_token: int
    lost: bool = False

    async def write(self, value: bytes) -> None:
        raise NotImplementedError


async def take_away(locks: StoredLocks, held: HeldLock, bucket: str, name: str) -> None:
    """A holder that was stopped past its TTL has lost its lock and does not know it yet."""
    await locks._storage.release(LockKeys.of_object(locks._prefix, bucket, name), held.owner)


async def test_a_fenced_put_replaces_while_the_lock_is_held(objects: ObjectStore, locks: StoredLocks) -> None:
    lock = locks.object_lock("b", "n")
    async with lock.hold() as held:
        first = await objects.put("b", "n", content_of(2500), fence=held)
        assert await objects.put("b", "n", content_of(2500), fence=held) == first
        await objects.put("b", "n", b"second", fence=held)
    assert await objects.read("b", "n") == b"second"
    with pytest.raises(LockLost, match="redis-object://b/n"):
        await objects.put("b", "n", b"third", fence=held)
    async with lock.hold() as held:
        await objects.put("b", "n", b"fourth", fence=held)
    assert await objects.read("b", "n") == b"fourth"


@pytest.mark.parametrize("others", ["none", "another", "another that has put"])
async def test_a_fenced_put_is_refused_once_the_lock_is_lost(
    objects: ObjectStore, locks: StoredLocks, others: str
) -> None:
    await objects.put("b", "n", b"old")
    lock = locks.object_lock("b", "n")
    async with lock.hold() as held, lock_of_another(objects, locks, held, others) as expected:
        assert not held.lost
        with pytest.raises(LockLost, match="redis-object://b/n"):
            await objects.put("b", "n", content_of(2500), fence=held)
        assert await objects.read("b", "n") == expected


@asynccontextmanager
async def lock_of_another(
    objects: ObjectStore, locks: StoredLocks, held: HeldLock, others: str
) -> AsyncIterator[bytes]:
    """End the lock, and let another holder acquire it or not; yield the object's content then."""
    await take_away(locks, held, "b", "n")
    if others == "none":
        yield b"old"
        return
    async with locks.object_lock("b", "n").hold() as newer:
        if others == "another that has put":
            await objects.put("b", "n", b"newer", fence=newer)
        yield await objects.read("b", "n")


async def test_a_lock_lost_during_the_upload_leaves_the_old_object(
    objects: ObjectStore, locks: StoredLocks
) -> None:
    await objects.put("b", "n", b"old")
    async with locks.object_lock("b", "n").hold() as held:

        async def source() -> AsyncIterator[bytes]:
            yield content_of(5000)
            await take_away(locks, held, "b", "n")
            yield b"end"

        with pytest.raises(LockLost):
            await objects.put("b", "n", source(), fence=held)
    assert await objects.read("b", "n") == b"old"


async def test_a_token_below_that_of_the_object_is_refused(objects: ObjectStore, locks: StoredLocks) -> None:
    async with locks.object_lock("b", "n").hold() as held:
        await objects.put("b", "n", b"x", fence=held)
        await objects.put("b", "n", b"unfenced")  # which keeps the token
        older = Claimed(held.name, held.owner, held.fencing_token - 1)
        with pytest.raises(LockLost):
            await objects.put("b", "n", b"older", fence=older)
        await objects.put("b", "n", b"same", fence=held)
    assert await objects.read("b", "n") == b"same"


async def test_a_holder_that_takes_its_lock_for_lost_puts_nothing(
    objects: ObjectStore, locks: StoredLocks
) -> None:
    async with locks.object_lock("b", "n").hold() as held:
        gone = Claimed(held.name, held.owner, held.fencing_token, lost=True)
        with pytest.raises(LockLost):
            await objects.put("b", "n", b"x", fence=gone)
    assert await objects.info("b", "n") is None


async def test_the_lock_of_another_object_is_no_fence(objects: ObjectStore, locks: StoredLocks) -> None:
    async with locks.object_lock("b", "other").hold() as held:
        with pytest.raises(ValueError, match="fenced by its own lock"):
            await objects.put("b", "n", b"x", fence=held)
    async with locks.lock("b/n").hold() as held:
        with pytest.raises(ValueError, match="fenced by its own lock"):
            await objects.put("b", "n", b"x", fence=held)
