"""Snapshots of the index while their writers die, sleep, come together and damage them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil
import pytest

from dynamo_redis.child import ChildProcess
from dynamo_redis.errors import LockNotAcquired
from dynamo_redis.events import publisher
from dynamo_redis.router.index import snapshotter
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.router.index.snapshot import IndexSnapshot, encode_snapshot
from dynamo_redis.router.index.snapshotter import SNAPSHOT_BUCKET
from dynamo_redis.store.event_base import EntryId, entry_order
from tests.kv_deployment import STREAM, WAIT_S, Deployment, deployment, flush, wait_until
from tests.processes import PROGRAMS


@pytest.fixture
async def deployed(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[Deployment]:
    async with deployment(dynamo_redis_url, dynamo_redis_prefix) as made:
        for _ in range(2):
            await made.worker(rank_count=2)
        made.chat(30)
        await flush(made.workers)
        yield made


async def stored_position(router: Indexer) -> EntryId | None:
    positions = await router._snapshots.positions()
    return positions[0] if positions else None


def always(_: Sequence[EntryId]) -> bool:
    return True


# --------------------------------------------------------------------------- the normal way


async def test_restart_reads_the_snapshot_and_later_events(deployed: Deployment) -> None:
    router = await deployed.router()
    await router.save_snapshot()
    info = await deployed.workers[0].runtime.events.info(STREAM)
    assert info is not None
    assert info.entry_count <= 1, "the stream is trimmed"
    deployed.chat(10)
    await deployed.wait_until_equal()
    await deployed.end_router(router)
    deployed.chat(10)
    await flush(deployed.workers)
    dumped = [worker.dump_count for worker in deployed.workers]
    restarted = await deployed.router()
    await deployed.wait_until_equal()
    assert [worker.dump_count for worker in deployed.workers] == dumped, "no worker dumped anything"
    assert restarted.state().events_count < router.state().events_count


async def test_worker_restarted_without_a_router_begins_empty(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot has its blocks, and the stream nothing new of it."""
    monkeypatch.setattr(publisher, "SILENCE_S", 1000.0)
    router = await deployed.router()
    await router.save_snapshot()
    await deployed.end_router(router)
    await deployed.restart_worker(deployed.workers[0])
    await deployed.router()
    await deployed.wait_until_equal()


async def test_the_threshold_s_snapshot_is_stored_by_one_of_many(
    dynamo_redis_url: str, dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotter, "CHECK_S", 0.05)
    monkeypatch.setattr(snapshotter, "RETRY_S", 0.2)
    monkeypatch.setattr(snapshotter, "SPACING_S", 0.0)
    async with deployment(dynamo_redis_url, dynamo_redis_prefix) as deployed:
        await deployed.worker()
        routers = [await deployed.router(router_snapshot_threshold=100) for _ in range(3)]
        for _ in range(3):
            before = [router.state().events_count for router in routers]
            while routers[0].state().events_count < before[0] + 100:
                deployed.chat(5)
                await asyncio.sleep(0.005)
            await flush(deployed.workers)
        await deployed.wait_until_equal()
        await wait_until(
            lambda: all(router.state().snapshot is not None for router in routers), "all know of a snapshot"
        )
        stored = sum(router.state().snapshots_stored_count for router in routers)
        events = routers[0].state().events_count
        assert 2 <= stored <= events // 100, "one a threshold, of all together"


async def test_snapshots_keep_their_spacing(
    dynamo_redis_url: str, dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotter, "CHECK_S", 0.01)
    async with deployment(dynamo_redis_url, dynamo_redis_prefix) as deployed:
        await deployed.worker()
        router = await deployed.router(router_snapshot_threshold=10)
        deployed.chat(20)
        await wait_until(lambda: router.state().snapshot is not None, "the first")
        deployed.chat(20)
        await deployed.wait_until_equal()
        await asyncio.sleep(0.1)
        assert router.state().snapshots_stored_count == 1


# --------------------------------------------------------------------------- damaged, of another version


@pytest.mark.parametrize("damage", ["a bit", "cut short", "another version", "no snapshot"])
async def test_a_snapshot_that_cannot_be_read_is_ignored_with_one_line(
    deployed: Deployment, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    router = await deployed.router()
    await router.save_snapshot()
    objects = deployed.workers[0].runtime.objects
    content = bytearray(await objects.read(SNAPSHOT_BUCKET, STREAM.path))
    if damage == "a bit":
        content[len(content) // 2] ^= 4
    elif damage == "cut short":
        del content[len(content) // 2 :]
    elif damage == "another version":
        monkey = IndexSnapshot((EntryId("1-1"),), {}, router.index)
        content = bytearray(b"".join(_encoded_as(99, monkey)))
    else:
        content = bytearray(b"something else")
    await objects.put(SNAPSHOT_BUCKET, STREAM.path, bytes(content))
    late = await deployed.router()
    await deployed.wait_until_equal(late)
    lines = [line for line in caplog.messages if "snapshot of" in line and "ignored" in line]
    assert len(lines) == 1, caplog.messages
    deployed.chat(5)
    await flush(deployed.workers)
    await deployed.wait_until_equal()
    assert (await late.save_snapshot()).position == await stored_position(late)  # a good one replaces it
    await deployed.wait_until_equal(await deployed.router())
    assert len([line for line in caplog.messages if "ignored" in line]) == 1, caplog.messages


def _encoded_as(version: int, snapshot: IndexSnapshot) -> list[bytes]:
    from dynamo_redis.router.index import snapshot as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SNAPSHOT_VERSION", version)
        return list(module.encode_snapshot(snapshot))


# --------------------------------------------------------------------------- several at once


async def test_two_routers_store_at_once_and_one_of_them_does(deployed: Deployment) -> None:
    routers = [await deployed.router() for _ in range(2)]
    outcomes = await asyncio.gather(
        *(router._snapshots.save(router._take_snapshot, always) for router in routers), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert all(isinstance(outcome, LockNotAcquired) for outcome in refused)
    assert len(refused) < 2
    await deployed.wait_until_equal(await deployed.router())


async def test_a_snapshot_never_replaces_one_that_is_further(deployed: Deployment) -> None:
    router, ahead = [await deployed.router() for _ in range(2)]
    old = router._take_snapshot()
    deployed.chat(5)
    await flush(deployed.workers)
    await deployed.wait_until_equal()
    await ahead.save_snapshot()
    position = await stored_position(ahead)
    assert position is not None
    assert entry_order(position) > entry_order(old.positions[0])
    await router._snapshots.save(lambda: old, always)
    assert await stored_position(ahead) == position
    await deployed.wait_until_equal(await deployed.router())


# --------------------------------------------------------------------------- writers that die or sleep

UPLOADER = PROGRAMS / "snapshot_uploader.py"


def encoded(router: Indexer) -> bytes:
    return b"".join(encode_snapshot(router._take_snapshot()))


async def test_killed_uploaders_leave_the_old_snapshot_and_its_events(
    deployed: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str, tmp_path: Path
) -> None:
    router = await deployed.router()
    await router.save_snapshot()
    old = await stored_position(router)
    deployed.chat(60)
    await flush(deployed.workers)
    await deployed.wait_until_equal()
    new = router.state().position
    (tmp_path / "new").write_bytes(encoded(router))
    chunk_bytes = len(encoded(router)) // 3
    streams = deployed.workers[0].runtime.events

    async def run(*points: str) -> tuple[EntryId | None, EntryId]:
        arguments = [dynamo_redis_url, dynamo_redis_prefix, str(tmp_path / "new"), str(chunk_bytes)]
        uploaders = ChildProcess.start([sys.executable, UPLOADER, *arguments, "kill", *points])
        async with asyncio.timeout(WAIT_S):
            assert await uploaders.wait() == 0
        info = await streams.info(STREAM)
        assert info is not None
        await deployed.wait_until_equal(await deployed.router())
        return await stored_position(router), info.trim_floor

    before = await streams.info(STREAM)
    assert before is not None
    assert await run("1", "2", "3", "before the commit") == (old, before.trim_floor)
    assert await run("before the trim") == (new, before.trim_floor)


@pytest.mark.parametrize("how", ["stop", "plain"])
async def test_an_uploader_that_sleeps_past_its_lock_is_refused(
    deployed: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str, tmp_path: Path, how: str
) -> None:
    """`plain` shows that the test sees what a lock without fencing lets happen."""
    router = await deployed.router()
    await router.save_snapshot()
    deployed.chat(20)
    await flush(deployed.workers)
    await deployed.wait_until_equal()
    late = router.state().position
    (tmp_path / "late").write_bytes(encoded(router))
    arguments = [dynamo_redis_url, dynamo_redis_prefix, str(tmp_path / "late"), "1000", how]
    uploader = ChildProcess.start([sys.executable, UPLOADER, *arguments, "before the commit"])
    await wait_until(lambda: stopped_children(uploader.pid), "it sleeps")
    (child,) = stopped_children(uploader.pid)
    deployed.chat(20)
    await flush(deployed.workers)
    await deployed.wait_until_equal()
    newer = await save(router)
    assert newer != late
    os.kill(child, signal.SIGCONT)
    async with asyncio.timeout(WAIT_S):
        exit_code = await uploader.wait()
    if how == "plain":
        assert (exit_code, await stored_position(router)) == (0, late), "the older one replaced the newer"
    else:
        assert (exit_code, await stored_position(router)) == (3, newer)
    await deployed.wait_until_equal(await deployed.router())  # trimmed blocks come from the workers


def stopped_children(pid: int) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children()
        return [child.pid for child in children if child.status() == psutil.STATUS_STOPPED]
    return []


async def save(router: Indexer) -> EntryId:
    """Store a snapshot as soon as the lock is free."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return (await router._snapshots.save(router._take_snapshot, always)).positions[0]
            except LockNotAcquired:
                await asyncio.sleep(0.01)


# --------------------------------------------------------------------------- reset


async def test_reset_states_begins_anew_while_others_run(deployed: Deployment) -> None:
    router = await deployed.router()
    await router.save_snapshot()
    deployed.chat(10)
    anew = await deployed.router(router_reset_states=True)
    assert await stored_position(anew) is None
    deployed.chat(10)
    await deployed.wait_until_equal()
    await wait_until(lambda: router.state().cut_off_count == 1, "the other has found the stream lost")
    await deployed.wait_until_equal(await deployed.router())
