"""Objects with killed uploaders, with servers that die, lose data or fall silent, and with many users at
once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from redis import Redis

from dynamo_redis.child import ChildProcess
from dynamo_redis.errors import LockLost, ObjectChanged, ObjectNotFound, StoreUnavailable
from dynamo_redis.store.base import Progress
from dynamo_redis.store.keys import ObjectKeys
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.chunks import ObjectTimes
from dynamo_redis.store.objects.manifest import chunk_name
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.server import EmbeddedServer
from faults.proxy import Conditions, Proxy
from tests.processes import PROGRAMS

CHUNK_BYTES = 1000
CHUNKS = 6
WAIT_S = 60.0
NO_ANSWERS = Conditions(swallow_answers=True)

OpenObjects = Callable[..., RedisObjectStore]


@pytest.fixture
async def open_objects(dynamo_redis_prefix: str) -> AsyncIterator[OpenObjects]:
    """Opens stores of the test's prefix, each as another process would."""
    opened: list[RedisObjectStore] = []

    def open_one(
        url: str, *, timeout_s: float = 3.0, chunk_bytes: int = CHUNK_BYTES, **changed: float
    ) -> RedisObjectStore:
        times = ObjectTimes(**{"claim_s": 0.1, "recovery_s": WAIT_S, **changed})
        client = RedisClient(url, timeout_s=timeout_s)
        opened.append(RedisObjectStore(client, dynamo_redis_prefix, chunk_bytes=chunk_bytes, times=times))
        return opened[-1]

    yield open_one
    for objects in opened:
        await objects.aclose()


@pytest.fixture
async def proxy(own_redis_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(own_redis_server.url) as proxy:
        yield proxy


@pytest.fixture
def redis(dynamo_redis_url: str) -> Iterator[Redis]:
    """A client for changes of the same keys by hand."""
    with Redis.from_url(dynamo_redis_url) as client:
        yield client


def content_of(seed: str, size_bytes: int = CHUNKS * CHUNK_BYTES - 1) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size_bytes)


def chunk_keys(keys: ObjectKeys, content: bytes) -> list[str]:
    ends = range(CHUNK_BYTES, len(content) + CHUNK_BYTES, CHUNK_BYTES)
    return [keys.chunk(chunk_name(hashlib.sha256(content[:end]).hexdigest(), CHUNK_BYTES)) for end in ends]


def once_at(done_bytes: int, action: Callable[[], object]) -> Progress:
    """A progress callback that acts once, when that many bytes are done."""
    pending = [action]

    def progress(done: int, total: int | None) -> None:
        if done >= done_bytes and pending:
            pending.pop()()

    return progress


def at_commit(
    objects: RedisObjectStore, before: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Act right before the first commit is sent."""
    run_script = objects._client.script
    pending = [before]

    async def script(script: Script, *arguments: Any) -> Any:
        if script.name == "object_commit" and pending:
            pending.pop()()
        return await run_script(script, *arguments)

    monkeypatch.setattr(objects._client, "script", script)


# --------------------------------------------------------------------------- uploaders killed

UPLOADER = PROGRAMS / "killed_uploader.py"


async def test_uploaders_killed_at_each_chunk_and_around_the_commit(
    open_objects: OpenObjects, dynamo_redis_url: str, dynamo_redis_prefix: str, redis: Redis, tmp_path: Path
) -> None:
    objects = open_objects(dynamo_redis_url)
    old, new = content_of("old"), content_of("new")
    (tmp_path / "new").write_bytes(new)
    before = [*map(str, range(1, CHUNKS + 1)), "before the commit"]
    for point in (*before, "after the commit"):
        await objects.put("b", point, old)
    argv = [dynamo_redis_url, dynamo_redis_prefix, str(tmp_path / "new"), str(CHUNKS)]
    uploaders = ChildProcess.start([sys.executable, UPLOADER, *argv])
    async with asyncio.timeout(WAIT_S):
        assert await uploaders.wait() == 0
    for point in before:
        keys = ObjectKeys(dynamo_redis_prefix, "b", point)
        assert await objects.read("b", point) == old
        left = [int(redis.pttl(key)) for key in chunk_keys(keys, new) if redis.exists(key)]
        assert len(left) >= (int(point) if point.isdigit() else CHUNKS)
        assert all(0 < ms <= 600_000 for ms in left)
        assert [redis.pttl(key) for key in chunk_keys(keys, old)] == [-1] * CHUNKS
    keys = ObjectKeys(dynamo_redis_prefix, "b", "after the commit")
    assert await objects.read("b", "after the commit") == new
    assert [redis.pttl(key) for key in chunk_keys(keys, new)] == [-1] * CHUNKS
    for point in (*before, "after the commit"):
        await objects.put("b", point, new)
        assert await objects.read("b", point) == new


async def test_chunk_claimed_by_a_stopped_upload_is_sent_by_another(
    open_objects: OpenObjects, dynamo_redis_url: str, dynamo_redis_prefix: str, redis: Redis
) -> None:
    objects = open_objects(dynamo_redis_url)
    content = content_of("x")
    keys = ObjectKeys(dynamo_redis_prefix, "b", "n")
    first = chunk_name(hashlib.sha256(content[:CHUNK_BYTES]).hexdigest(), CHUNK_BYTES)
    redis.set(keys.claim(first), "a stopped upload", px=300)
    async with asyncio.timeout(WAIT_S):
        await objects.put("b", "n", content)
    assert await objects.read("b", "n") == content


# --------------------------------------------------------------------------- many users at once


async def test_eight_uploaders_of_the_same_content_send_it_once(
    open_objects: OpenObjects, own_redis_server: EmbeddedServer
) -> None:
    content = content_of("the same", 8 << 20)
    stores = [open_objects(own_redis_server.url, chunk_bytes=1 << 18, claim_s=2.0) for _ in range(8)]
    with Redis.from_url(own_redis_server.url) as redis:

        def received_bytes() -> int:
            return int(redis.info("stats")["total_net_input_bytes"])

        before = received_bytes()
        infos = await asyncio.gather(*[objects.put("b", "n", content) for objects in stores])
        sent_bytes = received_bytes() - before
    assert len(set(infos)) == 1
    assert len(content) < sent_bytes < 1.3 * len(content)
    assert await stores[0].read("b", "n") == content


async def test_readers_of_any_speed_see_one_version_or_an_error(
    open_objects: OpenObjects, dynamo_redis_url: str
) -> None:
    """Old versions expire after a second here, so that slow readers lose theirs."""
    versions = [content_of(str(n), 12 * CHUNK_BYTES) for n in range(5)]
    writer, *others = (open_objects(dynamo_redis_url, expiry_s=1.0) for _ in range(7))
    await writer.put("b", "n", versions[0])
    whole_count = told_count = 0

    async def write() -> None:
        rng = random.Random(1)
        for number in itertools.count():
            if number >= 40 and whole_count > 10 and told_count > 3:
                return
            with contextlib.suppress(StoreUnavailable):  # where this took longer than pieces live
                await writer.put("b", "n", versions[number % 5])
            if number % 7 == 3:
                await writer.remove("b", "n")
            await asyncio.sleep(rng.uniform(0, 0.03))

    async def read(objects: RedisObjectStore, pause_s: float) -> None:
        nonlocal whole_count, told_count
        while not writing.done():
            seen = b""
            try:
                async for chunk in objects.get("b", "n"):
                    seen += chunk
                    await asyncio.sleep(pause_s)
                assert seen in versions
                whole_count += 1
            except (ObjectChanged, ObjectNotFound):
                assert any(version.startswith(seen) for version in versions)
                told_count += 1
                await asyncio.sleep(0)

    writing = asyncio.create_task(write())
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(writing, *[read(objects, n * 0.04) for n, objects in enumerate(others)])


# --------------------------------------------------------------------------- servers that die


async def die_and_come_back(server: EmbeddedServer) -> None:
    await server.kill()
    await asyncio.sleep(0.1)
    await server.start()


@pytest.mark.parametrize("keeps", ["everysec", "nothing"])
async def test_upload_survives_a_killed_and_restarted_server(
    open_objects: OpenObjects, tmp_path: Path, keeps: str
) -> None:
    content = content_of("x", 40 * CHUNK_BYTES)
    (tmp_path / "file").write_bytes(content)
    settings = {"appendonly": "no"} if keeps == "nothing" else {"appendfsync": keeps}
    async with EmbeddedServer(tmp_path, port=0, settings=settings) as server, asyncio.timeout(WAIT_S):
        objects = open_objects(server.url)
        tasks: list[asyncio.Task[None]] = []

        def kill() -> None:
            tasks.append(asyncio.create_task(die_and_come_back(server)))

        info = await objects.put("b", "n", tmp_path / "file", progress=once_at(len(content) // 2, kill))
        await asyncio.gather(*tasks)
        assert info.sha256 == hashlib.sha256(content).hexdigest()
        assert await objects.read("b", "n") == content


async def test_pieces_and_readers_survive_a_restart_with_data(
    open_objects: OpenObjects, tmp_path: Path
) -> None:
    content = content_of("x", 40 * CHUNK_BYTES)
    async with (
        EmbeddedServer(tmp_path, port=0, settings={"appendfsync": "always"}) as server,
        asyncio.timeout(WAIT_S),
    ):
        objects = open_objects(server.url)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), CHUNK_BYTES):
                if start == 20 * CHUNK_BYTES:
                    await server.kill()
                    asyncio.get_running_loop().call_later(0.1, lambda: restarts.append(restart()))
                yield content[start : start + CHUNK_BYTES]

        def restart() -> asyncio.Task[None]:
            return asyncio.create_task(server.start())

        restarts: list[asyncio.Task[None]] = []
        await objects.put("b", "n", pieces())
        reader = objects.get("b", "n")
        seen = await anext(reader)
        await server.kill()
        restarts.append(restart())
        assert seen + b"".join([chunk async for chunk in reader]) == content
        await asyncio.gather(*restarts)


async def test_an_upload_gives_up_on_a_server_that_stays_away(
    open_objects: OpenObjects, own_redis_server: EmbeddedServer
) -> None:
    objects = open_objects(own_redis_server.url, recovery_s=0.5)
    await objects.put("b", "n", b"old")
    reader = objects.get("b", "n")

    async def pieces() -> AsyncIterator[bytes]:
        yield content_of("x")
        await own_redis_server.kill()
        yield content_of("y")

    async with asyncio.timeout(WAIT_S):
        with pytest.raises(StoreUnavailable, match="connection refused"):
            await objects.put("b", "n", pieces())
    patient = open_objects(own_redis_server.url, recovery_s=1000.0)  # only with the chunks under way
    async with asyncio.timeout(WAIT_S):
        for call in (patient.put("b", "n", b"x"), patient.read("b", "n"), anext(reader)):
            with pytest.raises(StoreUnavailable):
                await call


async def test_a_reader_of_a_wiped_server_is_told(
    open_objects: OpenObjects, own_redis_server: EmbeddedServer
) -> None:
    objects = open_objects(own_redis_server.url)
    await objects.put("b", "n", content_of("x"))
    reader = objects.get("b", "n")
    seen = await anext(reader)
    with Redis.from_url(own_redis_server.url) as redis:
        redis.flushall()
    with pytest.raises(ObjectChanged, match="is gone"):
        seen += b"".join([chunk async for chunk in reader])
    with pytest.raises(ObjectNotFound):
        await objects.read("b", "n")


# --------------------------------------------------------------------------- connections that break


async def heal_after(proxy: Proxy, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    proxy.heal()


@contextlib.asynccontextmanager
async def silence(proxy: Proxy, pause_s: float) -> AsyncIterator[Callable[[], None]]:
    """Starts, when called, a time in which the server gets all requests and its answers are lost."""
    tasks: list[asyncio.Task[None]] = []

    def begin() -> None:
        proxy.conditions = NO_ANSWERS
        tasks.append(asyncio.create_task(heal_after(proxy, pause_s)))

    yield begin
    assert tasks
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("after_chunks", [1, 3, 6])
async def test_answers_lost_during_an_upload_are_made_up_for(
    open_objects: OpenObjects, own_redis_server: EmbeddedServer, proxy: Proxy, after_chunks: int
) -> None:
    objects = open_objects(proxy.url, timeout_s=0.2)
    content = content_of("x")
    async with silence(proxy, 0.3) as begin, asyncio.timeout(WAIT_S):
        at_bytes = min(after_chunks * CHUNK_BYTES, len(content))
        info = await objects.put("b", "n", content, progress=once_at(at_bytes, begin))
    direct = open_objects(own_redis_server.url)
    assert await direct.info("b", "n") == info
    assert await direct.read("b", "n") == content


async def test_commit_with_lost_answer_happens_once(
    open_objects: OpenObjects,
    own_redis_server: EmbeddedServer,
    proxy: Proxy,
    dynamo_redis_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects, direct = open_objects(proxy.url, timeout_s=0.2), open_objects(own_redis_server.url)
    await direct.put("b", "n", content_of("old"))
    pointer = ObjectKeys(dynamo_redis_prefix, "b", "n").current
    with Redis.from_url(own_redis_server.url) as redis:
        async with silence(proxy, 0.5) as begin, asyncio.timeout(WAIT_S):
            at_commit(objects, begin, monkeypatch)
            put = asyncio.create_task(objects.put("b", "n", content_of("new")))
            while await direct.read("b", "n") != content_of("new"):
                await anyio.sleep(0.01)
            committed = redis.hgetall(pointer)
            assert not put.done()
            info = await put
        assert redis.hgetall(pointer) == committed
    assert await direct.info("b", "n") == info


@pytest.mark.parametrize("replaced", [False, True])
async def test_fenced_commit_with_lost_answer_is_not_taken_for_refused(
    open_objects: OpenObjects,
    own_redis_server: EmbeddedServer,
    proxy: Proxy,
    dynamo_redis_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    replaced: bool,
) -> None:
    """A put takes effect; before its answer the lock is lost, and its next holder replaces the object or
    not."""
    objects, direct = open_objects(proxy.url, timeout_s=0.2), open_objects(own_redis_server.url)
    locks = RedisLocks(RedisClient(own_redis_server.url, timeout_s=3.0), dynamo_redis_prefix)
    lock = locks.object_lock("b", "n")
    await direct.put("b", "n", content_of("old"))
    async with silence(proxy, 0.5) as begin, asyncio.timeout(WAIT_S), lock.hold() as held:
        at_commit(objects, begin, monkeypatch)
        put = asyncio.create_task(objects.put("b", "n", content_of("first"), fence=held))
        while await direct.read("b", "n") != content_of("first"):
            await anyio.sleep(0.01)
        await locks._storage.release(lock._keys, held.owner)  # type: ignore[attr-defined]
        if replaced:
            async with lock.hold() as newer:
                newest = await direct.put("b", "n", content_of("second"), fence=newer)
            assert (await put).sha256 != newest.sha256
        else:
            assert await put == await direct.info("b", "n")
        with pytest.raises(LockLost):
            await objects.put("b", "n", content_of("third"), fence=held)
    assert await direct.read("b", "n") == content_of("second" if replaced else "first")
    await locks.aclose()


@pytest.mark.parametrize("later", ["removed", "removed, new", "replaced"])
async def test_put_repeated_after_a_lost_answer_undoes_nothing(
    open_objects: OpenObjects, own_redis_server: EmbeddedServer, proxy: Proxy, monkeypatch: Any, later: str
) -> None:
    """A put takes effect; before its answer another process removes or replaces the object."""
    objects, direct = open_objects(proxy.url, timeout_s=0.2), open_objects(own_redis_server.url)
    if later != "removed, new":
        await direct.put("b", "n", content_of("old"))
    async with silence(proxy, 0.5) as begin, asyncio.timeout(WAIT_S):
        at_commit(objects, begin, monkeypatch)
        put = asyncio.create_task(objects.put("b", "n", content_of("first")))
        while await direct.info("b", "n") is None or await direct.read("b", "n") != content_of("first"):
            await anyio.sleep(0.01)
        first = await direct.info("b", "n")
        if later == "replaced":
            await direct.put("b", "n", content_of("second"))
        else:
            assert await direct.remove("b", "n")
        assert await put == first
    left = await direct.info("b", "n")
    if later == "replaced":
        assert await direct.read("b", "n") == content_of("second")
    else:
        assert left is None


async def test_uploads_and_reads_survive_repeated_cuts(open_objects: OpenObjects, proxy: Proxy) -> None:
    objects = open_objects(proxy.url, timeout_s=1.0)
    under_way = asyncio.Event()
    cuts_count = 0

    async def cut() -> None:
        nonlocal cuts_count
        pause_s = 0.005
        while await under_way.wait():
            proxy.cut_one()
            cuts_count += 1
            await asyncio.sleep(pause_s)
            pause_s *= 1.03  # so that a machine of any speed gets something done between two

    cutting = asyncio.create_task(cut())
    async with asyncio.timeout(WAIT_S):
        for number in range(2):
            content = content_of(str(number), 60 * CHUNK_BYTES)
            await objects.put("b", "n", content, progress=lambda *_: under_way.set())
            under_way.clear()
            reader = objects.get("b", "n")
            seen = await anext(reader)
            under_way.set()
            assert seen + b"".join([chunk async for chunk in reader]) == content
            under_way.clear()
    assert cuts_count > 8
    cutting.cancel()
    await asyncio.wait([cutting])
