"""What every object store does with content, wherever it keeps it: cut it into chunks, hash it, carry it to
and from files."""

from __future__ import annotations

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

from dynamo_redis.errors import ObjectChanged
from dynamo_redis.store.base import ObjectInfo, ObjectSource, Progress

CHUNK_BYTES = 1 << 20
_INLINE_BYTES = 1 << 16  # hashing this takes less than handing it to a thread

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an object, and its SHA-256 in hex, by which it is stored."""

    content: bytes
    digest: str


async def source_size_bytes(source: ObjectSource) -> int | None:
    """How much there is to store; None for pieces that are still to come. Raises OSError."""
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Path):
        return (await anyio.Path(source).stat()).st_size
    return None


async def chunks_of(source: ObjectSource, chunk_bytes: int) -> AsyncGenerator[bytes]:
    """Cut a source into chunks, all full but the last, holding about one of them. Raises OSError.

    Close it (`contextlib.aclosing`): it may hold a file open.
    """
    if isinstance(source, bytes):
        for start in range(0, len(source), chunk_bytes):
            yield source[start : start + chunk_bytes]
    elif isinstance(source, Path):
        async with await anyio.open_file(source, "rb") as file:
            while content := await file.read(chunk_bytes):
                yield content
    else:
        held = bytearray()
        async for piece in source:
            held += piece
            while len(held) >= chunk_bytes:
                yield bytes(held[:chunk_bytes])
                del held[:chunk_bytes]
        if held:
            yield bytes(held)


async def digest_of(content: bytes, whole: hashlib._Hash) -> str:
    """The SHA-256 of one chunk, in hex; feeds the hash of the whole object, too. Off the loop if large."""

    def compute() -> str:
        whole.update(content)
        return hashlib.sha256(content).hexdigest()

    return compute() if len(content) <= _INLINE_BYTES else await run_sync(compute)


class WholeReads(ABC):
    """`get`, `read` and `fetch`, over a store's `_open`."""

    @abstractmethod
    async def _open(self, bucket: str, name: str) -> tuple[ObjectInfo, AsyncGenerator[bytes]]:
        """An object, and its chunks, verified one by one. Raises ObjectNotFound."""

    async def get(self, bucket: str, name: str) -> AsyncIterator[bytes]:
        """As `ObjectStore.get`."""
        _, pieces = await self._open(bucket, name)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def read(self, bucket: str, name: str) -> bytes:
        """As `ObjectStore.read`."""

        async def attempt() -> bytes:
            content = bytearray()
            async with contextlib.aclosing((await self._open(bucket, name))[1]) as pieces:
                async for piece in pieces:
                    content += piece
            return bytes(content)

        return await _twice(attempt)

    async def fetch(
        self, bucket: str, name: str, path: Path, *, progress: Progress | None = None
    ) -> ObjectInfo:
        """As `ObjectStore.fetch`. Raises OSError if the file cannot be written."""

        async def attempt() -> ObjectInfo:
            info, pieces = await self._open(bucket, name)
            async with contextlib.aclosing(pieces):
                await _write_file(path, pieces, progress, info.size_bytes)
            return info

        return await _twice(attempt)


async def _twice(attempt: Callable[[], Awaitable[T]]) -> T:
    """Start over once if the object was replaced meanwhile; of a damaged one the second try says so, too."""
    try:
        return await attempt()
    except ObjectChanged:
        return await attempt()


async def _write_file(
    path: Path, pieces: AsyncGenerator[bytes], progress: Progress | None, size_bytes: int
) -> None:
    """Write beside `path`, then rename over it: nobody sees half a file, and a failure leaves none."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        done_bytes = 0
        async with await anyio.open_file(draft, "xb") as file:
            async for piece in pieces:
                await file.write(piece)
                done_bytes += len(piece)
                if progress is not None:
                    progress(done_bytes, size_bytes)
        await run_sync(draft.replace, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
