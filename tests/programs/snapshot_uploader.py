"""Stores a snapshot of the index from child processes, each of which signals itself at a point of the upload.

Run as `snapshot_uploader.py URL PREFIX FILE CHUNK_BYTES HOW POINT...`: one child for each point. A point is
the number of a chunk, "before the commit" or "before the trim". HOW is one of

- kill: the child kills itself. The program fails unless each child was killed.
- stop: the child stops itself. The program exits with the exit code of the first child.
- plain: as stop, with a lock that has no fencing token.

A child exits with 0 if the snapshot is stored. If its lock is lost, it exits with 3 if the write was refused
for that reason, and with 4 if not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from dynamo_redis.config import EventSettings
from dynamo_redis.errors import LockLost, LockNotAcquired
from dynamo_redis.router.index.snapshot import decode_snapshot
from dynamo_redis.router.index.snapshotter import Snapshots
from dynamo_redis.store.base import ObjectInfo
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.objects.chunks import ObjectTimes
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.streams.redis_streams import RedisEventStreams

URL, PREFIX, PATH, CHUNK_BYTES, HOW, *POINTS = sys.argv[1:]


class PlainLock:
    """A lock without fencing: SET NX PX."""

    @contextlib.asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        async with Redis.from_url(URL) as redis:
            while not await redis.set(f"{{{PREFIX}/plain}}", "me", nx=True, px=300):
                await asyncio.sleep(0.01)
            yield None


def snapshots_signalled_at(point: str, writes: list[asyncio.Future[ObjectInfo]]) -> Snapshots:
    """Open the snapshots; the first upload that reaches the point signals this process.

    Each upload is added to `writes`.
    """
    client = RedisClient(URL, timeout_s=3)
    objects = RedisObjectStore(client, PREFIX, chunk_bytes=int(CHUNK_BYTES), times=ObjectTimes(claim_s=0.1))
    streams = RedisEventStreams(client, PREFIX, EventSettings.load())
    number = signal.SIGSTOP if HOW in ("stop", "plain") else signal.SIGKILL
    run_script, put, seen, pending = client.script, objects.put, 0, [number]

    def signal_once() -> None:
        if pending:
            os.kill(os.getpid(), pending.pop())

    async def script(script: Script, *arguments: Sequence[Any]) -> Any:
        if script.name == "object_commit" and point == "before the commit":
            signal_once()
        if script.name == "stream_trim" and point == "before the trim":
            signal_once()
        return await run_script(script, *arguments)

    def progress(done: int, total: int | None) -> None:
        nonlocal seen
        seen += 1
        if point == str(seen):
            signal_once()

    async def put_on(*args: Any, **options: Any) -> ObjectInfo:
        """Upload on after a cancellation of the holder, as a thread or a computer that sleeps would."""
        writes.append(asyncio.ensure_future(put(*args, progress=progress, **options)))
        return await asyncio.shield(writes[-1])

    client.script = script  # type: ignore[method-assign, assignment]
    objects.put = put_on  # type: ignore[method-assign]
    stream = StreamName("test", "backend", "kv_events")
    snapshots = Snapshots(objects, RedisLocks(client, PREFIX), streams, (stream,), lock_ttl_s=0.2)
    if HOW == "plain":
        snapshots._lock = PlainLock()  # type: ignore[assignment]
    return snapshots


async def upload(point: str) -> int:
    """Store the snapshot; return the exit code."""
    writes: list[asyncio.Future[ObjectInfo]] = []
    snapshots = snapshots_signalled_at(point, writes)
    content = Path(PATH).read_bytes()
    while True:
        try:
            await snapshots.save(lambda: decode_snapshot(content), lambda _: True)
        except LockNotAcquired:
            await asyncio.sleep(0.01)
        except LockLost:
            await asyncio.wait(writes)
            return 3 if isinstance(writes[-1].exception(), LockLost) else 4
        else:
            return 0


for point in POINTS:
    child = os.fork()
    if not child:
        os._exit(asyncio.run(upload(point)))
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if HOW != "kill":
        sys.exit(exit_code)
    assert exit_code == -signal.SIGKILL, point
