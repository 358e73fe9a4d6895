"""Uploads an object from child processes, each of which kills itself at a point of the upload.

Run as `killed_uploader.py URL PREFIX FILE CHUNK_COUNT`. The points are the number of each chunk, "before the
commit" and "after the commit". Each child's object is named like its point. The program fails unless each
child was killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamo_redis.store.objects.chunks import ObjectTimes
from dynamo_redis.store.objects.redis_objects import RedisObjectStore
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.scripts import Script


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def upload(url: str, prefix: str, path: Path, point: str) -> None:
    client = RedisClient(url, timeout_s=3)
    store = RedisObjectStore(client, prefix, chunk_bytes=1000, times=ObjectTimes(claim_s=0.1))
    run_script, stored_count = client.script, 0

    async def script(script: Script, *arguments: Sequence[Any]) -> Any:
        if script.name == "object_commit" and point == "before the commit":
            die()
        answer = await run_script(script, *arguments)
        if script.name == "object_commit" and point == "after the commit":
            die()
        return answer

    def progress(done: int, total: int | None) -> None:
        nonlocal stored_count
        stored_count += 1
        if point == str(stored_count):
            die()

    client.script = script  # type: ignore[method-assign, assignment]
    await store.put("b", point, path.read_bytes(), progress=progress)


def main(url: str, prefix: str, path: str, chunk_count: str) -> None:
    points = [*map(str, range(1, int(chunk_count) + 1)), "before the commit", "after the commit"]
    for point in points:
        if not os.fork():
            asyncio.run(upload(url, prefix, Path(path), point))
            os._exit(0)
    killed = [os.WTERMSIG(os.wait()[1]) for _ in points]
    assert killed == [signal.SIGKILL] * len(points), killed


main(*sys.argv[1:])
