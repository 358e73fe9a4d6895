"""The object store in memory, for tests and for a single process: the same promises, no server."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator

from dynamo_redis.errors import ObjectNotFound
from dynamo_redis.store.base import ObjectInfo, ObjectSource, Progress
from dynamo_redis.store.object_content import CHUNK_BYTES, WholeReads, chunks_of, digest_of, source_size_bytes
from dynamo_redis.store.object_manifest import ObjectKeys


class MemoryObjectStore(WholeReads):
    """`ObjectStore` in a dictionary. A reader keeps the version that it began with."""

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._objects: dict[tuple[str, str], tuple[ObjectInfo, tuple[bytes, ...]]] = {}

    async def put(
        self, bucket: str, name: str, source: ObjectSource, *, progress: Progress | None = None
    ) -> ObjectInfo:
        """As `ObjectStore.put`. Raises OSError if a file cannot be read."""
        ObjectKeys("memory", bucket, name)  # refuses the same names
        total_bytes = await source_size_bytes(source)
        whole = hashlib.sha256()
        chunks: list[bytes] = []
        done_bytes = 0
        async with contextlib.aclosing(chunks_of(source, self._chunk_bytes)) as contents:
            async for content in contents:
                await digest_of(content, whole)
                chunks.append(content)
                done_bytes += len(content)
                if progress is not None:
                    progress(done_bytes, total_bytes)
        info = ObjectInfo(bucket, name, done_bytes, whole.hexdigest(), len(chunks), time.time())
        current = self._objects.get((bucket, name))
        if current is None or current[0].sha256 != info.sha256:
            self._objects[bucket, name] = (info, tuple(chunks))
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

    async def list(self, bucket: str | None = None) -> list[ObjectInfo]:
        """As `ObjectStore.list`."""
        infos = [info for info, _ in self._objects.values() if bucket in (None, info.bucket)]
        return sorted(infos, key=lambda info: (info.bucket, info.name))

    async def remove(self, bucket: str, name: str) -> bool:
        """As `ObjectStore.remove`."""
        ObjectKeys("memory", bucket, name)
        return self._objects.pop((bucket, name), None) is not None

    async def aclose(self) -> None:
        """Nothing is held."""
