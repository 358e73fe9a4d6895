"""The object store in memory, for tests and for a single process: the same contract, no server."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Callable

from dynamo_redis.errors import LockLost, ObjectNotFound
from dynamo_redis.store.base import HeldLock, Locks, ObjectInfo, ObjectSource, Progress
from dynamo_redis.store.keys import ObjectKeys
from dynamo_redis.store.locks.memory import MemoryLocks
from dynamo_redis.store.objects.content import (
    CHUNK_BYTES,
    ObjectReads,
    check_fence,
    chunks_of,
    source_size_bytes,
)


class MemoryObjectStore(ObjectReads):
    """`ObjectStore` in a dictionary. A reader keeps the version that it began with.

    `locks` are the locks of fenced puts.
    """

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES, locks: Locks | None = None) -> None:
        self._chunk_bytes = chunk_bytes
        self._locks = locks or MemoryLocks()
        self._objects: dict[tuple[str, str], tuple[ObjectInfo, tuple[bytes, ...]]] = {}
        self._tokens: dict[tuple[str, str], int] = {}

    async def put(
        self,
        bucket: str,
        name: str,
        source: ObjectSource,
        *,
        progress: Progress | None = None,
        fence: HeldLock | None = None,
    ) -> ObjectInfo:
        """As `ObjectStore.put`. Raises OSError if a file cannot be read."""
        keys = ObjectKeys("memory", bucket, name)
        check_fence(fence, keys.url)
        total_bytes = await source_size_bytes(source)
        whole = hashlib.sha256()
        contents: list[bytes] = []
        done_bytes = 0
        async with contextlib.aclosing(chunks_of(source, self._chunk_bytes, whole)) as chunks:
            async for chunk in chunks:
                contents.append(chunk.content)
                done_bytes += len(chunk.content)
                if progress is not None:
                    progress(done_bytes, total_bytes)
        check_fence(fence, keys.url)
        if fence is not None:
            holder = await self._locks.object_lock(bucket, name).holder()  # in memory: does not suspend
            written_by = self._tokens.get((bucket, name), 0)
            if holder is None or holder.owner != fence.owner or written_by > fence.fencing_token:
                raise LockLost(keys.url, "it ended on the server, or has another holder")
            self._tokens[bucket, name] = fence.fencing_token
        info = ObjectInfo(bucket, name, done_bytes, whole.hexdigest(), len(contents), time.time())
        current = self._objects.get((bucket, name))
        if current is None or current[0].sha256 != info.sha256:
            self._objects[bucket, name] = (info, tuple(contents))
        return self._objects[bucket, name][0]

    async def _open(self, bucket: str, name: str) -> tuple[ObjectInfo, AsyncGenerator[bytes]]:
        keys = ObjectKeys("memory", bucket, name)
        found = self._objects.get((bucket, name))
        if found is None:
            raise ObjectNotFound(keys.url)

        async def chunks() -> AsyncGenerator[bytes]:
            for chunk in found[1]:
                yield chunk

        return found[0], chunks()

    async def info(self, bucket: str, name: str) -> ObjectInfo | None:
        """As `ObjectStore.info`."""
        ObjectKeys("memory", bucket, name)
        found = self._objects.get((bucket, name))
        return found and found[0]

    async def holds(self, bucket: str, name: str, sha256: str) -> bool:
        """As `ObjectStore.holds`."""
        info = await self.info(bucket, name)
        return info is not None and info.sha256 == sha256

    async def list(
        self, bucket: str | None = None, *, on_left_out: Callable[[str], None] | None = None
    ) -> list[ObjectInfo]:
        """As `ObjectStore.list`."""
        infos = [info for info, _ in self._objects.values() if bucket in (None, info.bucket)]
        return sorted(infos, key=lambda info: (info.bucket, info.name))

    async def remove(self, bucket: str, name: str) -> bool:
        """As `ObjectStore.remove`."""
        ObjectKeys("memory", bucket, name)
        self._tokens.pop((bucket, name), None)
        return self._objects.pop((bucket, name), None) is not None

    async def aclose(self) -> None:
        """Do nothing: there are no resources to release."""
