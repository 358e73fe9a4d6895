"""The parts of an object store that do not depend on its storage: cutting, hashing, reading and writing
files."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio
from anyio.to_thread import run_sync

from dynamo_redis.errors import LockLost, ObjectChanged
from dynamo_redis.store.base import HeldLock, ObjectInfo, ObjectSource, Progress

CHUNK_BYTES = 1 << 20
_INLINE_BYTES = 1 << 16  # hashing this takes less than handing it to a thread

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an object, and the SHA-256, in hex, of the object up to the end of this piece."""

    content: bytes
    digest: str


async def source_size_bytes(source: ObjectSource) -> int | None:
    """Return the size of a source; None if it consists of pieces yet to come. Raises OSError."""
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Path):
        return (await anyio.Path(source).stat()).st_size
    return None


async def chunks_of(source: ObjectSource, chunk_bytes: int, whole: hashlib._Hash) -> AsyncGenerator[Chunk]:
    """Cut a source into chunks, all full but the last, and hash them all with `whole`.

    Holds about one chunk in memory. Raises OSError. Close it (`contextlib.aclosing`): it may hold a file
    open.
    """
    if isinstance(source, Path):
        async with await anyio.open_file(source, "rb") as file:

            def read() -> Chunk:
                return _hashed(file.wrapped.read(chunk_bytes), whole)

            while (chunk := await run_sync(read)).content:
                yield chunk
    elif isinstance(source, bytes):
        for start in range(0, len(source), chunk_bytes):
            yield await next_chunk(source[start : start + chunk_bytes], whole)
    else:
        held = bytearray()
        async for piece in source:
            held += piece
            while len(held) >= chunk_bytes:
                yield await next_chunk(bytes(held[:chunk_bytes]), whole)
                del held[:chunk_bytes]
        if held:
            yield await next_chunk(bytes(held), whole)


def _hashed(content: bytes, whole: hashlib._Hash) -> Chunk:
    whole.update(content)
    return Chunk(content, whole.hexdigest())


async def next_chunk(content: bytes, whole: hashlib._Hash) -> Chunk:
    """Return the next chunk: hash its content with `whole`, in a thread if the content is large."""
    if len(content) <= _INLINE_BYTES:
        return _hashed(content, whole)
    return await asyncio.get_running_loop().run_in_executor(None, _hashed, content, whole)


def check_fence(fence: HeldLock | None, url: str) -> None:
    """Raise ValueError if a lock is of another object, LockLost if its holder knows that it is lost."""
    if fence is None:
        return
    if fence.name != url:
        raise ValueError(f"{url} is fenced by its own lock, not by that of {fence.name}")
    if fence.lost:
        raise LockLost(url, "the object is not put without it")


class ObjectReads(ABC):
    """`get`, `read` and `fetch` of an object store, based on its `_open`."""

    @abstractmethod
    async def _open(self, bucket: str, name: str) -> tuple[ObjectInfo, AsyncGenerator[bytes]]:
        """Return an object's metadata and its chunks, each verified. Raises ObjectNotFound."""

    async def get(self, bucket: str, name: str) -> AsyncIterator[bytes]:
        """As `ObjectStore.get`."""
        _, pieces = await self._open(bucket, name)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def read(self, bucket: str, name: str) -> bytes:
        """As `ObjectStore.read`."""

        async def attempt() -> bytes:
            async with contextlib.aclosing((await self._open(bucket, name))[1]) as pieces:
                return b"".join([piece async for piece in pieces])

        return await _twice(attempt)

    async def fetch(
        self, bucket: str, name: str, path: Path, *, progress: Progress | None = None
    ) -> ObjectInfo:
        """As `ObjectStore.fetch`. Raises OSError if the file cannot be written."""

        async def attempt() -> ObjectInfo:
            info, pieces = await self._open(bucket, name)
            async with contextlib.aclosing(pieces):
                # Write to a draft, then rename it: no reader sees half a file, and a failure leaves none.
                draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
                try:
                    done_bytes = 0
                    async with await anyio.open_file(draft, "xb") as file:
                        async for piece in pieces:
                            await file.write(piece)
                            done_bytes += len(piece)
                            if progress is not None:
                                progress(done_bytes, info.size_bytes)
                    await run_sync(draft.replace, path)
                except BaseException:
                    draft.unlink(missing_ok=True)
                    raise
            return info

        return await _twice(attempt)


async def _twice(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat a read once if the object was replaced meanwhile. If it is damaged, the second attempt raises
    too."""
    try:
        return await attempt()
    except ObjectChanged:
        return await attempt()
