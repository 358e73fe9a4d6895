"""The object store on Redis: files of any size in chunks, replaced atomically, verified when read.

The keys of an object share one hash tag, `{prefix/object/<bucket>/<name>}`, so that one script can use all of
them, also on a cluster:

    {tag}:current                        hash: the current version's manifest (size, sha256, digests, codec)
    {tag}:chunk:<chunk_bytes>:<sha256>   a chunk, under the digest of the content up to its end
    {tag}:done:<version>                 expires: mark that the commit of that version took effect

A *put* writes the chunks beside the current version, with an expiry that it renews until it is done. Then
one script checks that every chunk exists, removes its expiry, and replaces the manifest. An upload that dies
leaves only chunks that expire. A chunk that Redis has already is not sent again, whether it is of an earlier
upload, of the current version, or of one just replaced. Of several uploads of the same content at the same
time, only one sends each chunk.

A *reader* reads the manifest once and then the chunks that it lists. The chunks of a replaced version get an
expiry; the reader renews it for the chunks that it has still to read, each third of that time. It verifies
each chunk before it yields it. The digests are those of the content from its beginning, so the last one
verifies the whole.

Both continue for some seconds when their connection breaks (`ObjectTimes`): a few chunks are under way at a
time, and each chunk and the commit can be repeated. A commit that took effect leaves a mark, so that its
repetition never undoes a later change of the object.

An index under a tag of its own, `{prefix/object}:names`, has the names of all objects. No script can change
keys of two tags. So a put adds the name *before* it makes the object current, and a listing checks each name:
an object that is current is always listed. A name without an object is dropped once it is an hour old, since
a put takes far less time between its two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import (
    LockLost,
    ObjectChanged,
    ObjectNotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from dynamo_redis.store.base import HeldLock, ObjectInfo, ObjectSource, Progress
from dynamo_redis.store.keys import LockKeys, ObjectKeys
from dynamo_redis.store.objects.chunks import ObjectChunks, ObjectTimes, recovering
from dynamo_redis.store.objects.content import (
    CHUNK_BYTES,
    Chunk,
    ObjectReads,
    check_fence,
    chunks_of,
    next_chunk,
    source_size_bytes,
)
from dynamo_redis.store.objects.manifest import INFO_FIELDS, Manifest, Replaceable, chunk_name, info_of_fields
from dynamo_redis.store.objects.overlap import overlapped
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.scripts import load_script

log = logging.getLogger(__name__)

CHUNKS_UNDER_WAY_COUNT = 3
"""How many chunks an upload sends, or a read fetches, at a time: enough that none waits for another's round
trip, few enough that the memory of both sides is bounded and the server is never given a burst."""

_UPLOAD_TRIES = 3
_COMMIT_TRIES = 100
_KEYS_A_CALL = 500
_FORGET_AFTER_S = 3600.0

_COMMIT = load_script("object_commit")
_REMOVE = load_script("object_remove")
_FORGET = load_script("object_forget")

T = TypeVar("T")


_Pointer = list[bytes | None] | StoreRefused
"""The values of `INFO_FIELDS`; or the error of Redis, if the key has another type."""


class RedisObjectStore(ObjectReads):
    """`ObjectStore` on one Redis or Valkey. `aclose` closes the client.

    Cancelling a call is safe at any point: an object is replaced as a whole or not at all.
    """

    def __init__(
        self,
        client: StoreClient,
        prefix: str,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        times: ObjectTimes | None = None,
        read_only: bool = False,
    ) -> None:
        """`read_only`: reading and listing write nothing, so a version that is replaced meanwhile may
        expire."""
        self._read_only = read_only
        self._client = client
        self._prefix = prefix
        self._chunk_bytes = chunk_bytes
        self._times = times or ObjectTimes()

    @classmethod
    def from_settings(cls, settings: StoreSettings, *, read_only: bool = False) -> Self:
        """Return a store with a client of its own, not yet connected. Raises ConfigError if no server is
        configured."""
        url, timeout_s = settings.require_url(), settings.command_timeout_s
        name, login = "dynamo-redis-objects", settings.login()
        client = open_client(url, timeout_s=timeout_s, client_name=name, login=login)
        return cls(client, settings.prefix, read_only=read_only)

    # ------------------------------------------------------------------ put

    async def put(
        self,
        bucket: str,
        name: str,
        source: ObjectSource,
        *,
        progress: Progress | None = None,
        fence: HeldLock | None = None,
    ) -> ObjectInfo:
        """As `ObjectStore.put`; holds a few chunks in memory. Of several puts at once, the last to end wins.

        Raises OSError if a file cannot be read. If Redis loses chunks meanwhile (a restart without its data),
        bytes and files are sent again. Pieces cannot be read again: then it raises StoreUnavailable.
        """
        keys = ObjectKeys(self._prefix, bucket, name)
        check_fence(fence, keys.url)
        await self._replaceable(keys)  # raises before the first chunk is sent, and without retries
        tries = _UPLOAD_TRIES if isinstance(source, bytes | Path) else 1
        for _ in range(tries):
            sent: list[str] = []
            async with self._renewed(keys, sent):
                manifest = await self._upload(keys, source, sent, progress)
                info = await self._commit(keys, manifest, fence)
            if info is not None:
                return info
        raise StoreUnavailable(
            f"{keys.url}: Redis lost chunks while they were uploaded; put the object again"
        )

    async def _upload(
        self, keys: ObjectKeys, source: ObjectSource, sent: list[str], progress: Progress | None
    ) -> Manifest:
        """Send the chunks that Redis lacks; add to `sent` the names of all, which must be kept alive from now
        on."""
        total_bytes = await source_size_bytes(source)
        whole = hashlib.sha256()
        digests: list[str] = []
        done_bytes = 0
        chunks = self._chunks(keys)
        upload = secrets.token_hex(8)

        async def send(chunk: Chunk) -> tuple[str, int]:
            name = chunk_name(chunk.digest, self._chunk_bytes)
            await chunks.send(name, chunk.content, upload)
            sent.append(name)
            return chunk.digest, len(chunk.content)

        async def sends() -> AsyncGenerator[Coroutine[Any, Any, tuple[str, int]]]:
            async with contextlib.aclosing(chunks_of(source, self._chunk_bytes, whole)) as found:
                async for chunk in found:
                    yield send(chunk)

        async with contextlib.aclosing(overlapped(sends(), limit_count=CHUNKS_UNDER_WAY_COUNT)) as done:
            async for digest, size_bytes in done:
                digests.append(digest)
                done_bytes += size_bytes
                if progress is not None:
                    progress(done_bytes, total_bytes)
        return Manifest(
            version=secrets.token_hex(8),
            size_bytes=done_bytes,
            sha256=whole.hexdigest(),
            chunk_bytes=self._chunk_bytes,
            digests=tuple(digests),
        )

    async def _commit(self, keys: ObjectKeys, new: Manifest, fence: HeldLock | None) -> ObjectInfo | None:
        """Make the manifest current; return None if chunks are missing."""

        async def add_to_index() -> None:
            await self._client.execute("ZADD", self._names, await self._server_time_s(), keys.path)

        await self._recovering(add_to_index)
        done, new_chunks = keys.done(new.version), keys.chunks(new.chunks)
        lock = LockKeys.of_object(self._prefix, keys.bucket, keys.name).lock
        kept = set(new.chunks)

        async def attempt() -> list[Any]:
            check_fence(fence, keys.url)
            old = await self._replaceable(keys)
            replaced = [chunk for chunk in old.chunks if chunk not in kept] if old else []
            owner, token = (fence.owner, fence.fencing_token) if fence else ("", "")
            answer: list[Any] = await self._client.script(
                _COMMIT,
                [keys.current, lock, done, *new_chunks, *keys.chunks(replaced)],
                [
                    *(len(new_chunks), old.version if old else "", self._times.expiry_ms),
                    *(owner, token, *new.fields()),
                ],
            )
            return answer

        for _ in range(_COMMIT_TRIES):
            answer, *rest = await self._recovering(attempt)
            if answer == b"ok":
                return new.info(keys, created_at_ms=int(rest[0]))
            if answer == b"missing":
                log.info("%s: %d chunks are gone before the upload is complete", keys.url, rest[0])
                return None
            if answer == b"lost":
                raise LockLost(keys.url, "it ended on the server, or has another holder")
        raise StoreUnavailable(f"{keys.url} is replaced all the time by other puts; put it again later")

    @contextlib.asynccontextmanager
    async def _renewed(self, keys: ObjectKeys, sent: list[str]) -> AsyncIterator[None]:
        """Keep the chunks named in `sent` alive while the block runs."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(self._times.expiry_s / 3)
                try:
                    await self._chunks(keys).renew(tuple(sent))
                except StoreError as exc:
                    log.debug("%s: chunks not renewed: %s", keys.url, exc)  # the commit checks them

        task = asyncio.create_task(renew(), name=f"renew chunks of {keys.url}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    # ------------------------------------------------------------------ read

    async def _open(self, bucket: str, name: str) -> tuple[ObjectInfo, AsyncGenerator[bytes]]:
        keys = ObjectKeys(self._prefix, bucket, name)
        manifest = await self._manifest(keys)
        if manifest is None:
            raise ObjectNotFound(keys.url)
        return manifest.info(keys, manifest.created_at_ms), self._verified(keys, manifest)

    async def _verified(self, keys: ObjectKeys, manifest: Manifest) -> AsyncGenerator[bytes]:
        """Yield the content, each chunk after its digest is verified."""
        chunks, names = self._chunks(keys), manifest.chunks

        async def fetches() -> AsyncGenerator[Coroutine[Any, Any, bytes | None]]:
            renewed_at = time.monotonic()
            for index, name in enumerate(names):
                if not self._read_only and time.monotonic() - renewed_at > self._times.expiry_s / 3:
                    renewed_at = time.monotonic()
                    await self._recovering(partial(chunks.renew, names[index:]))  # those still to be read
                yield chunks.fetch(name)

        whole = hashlib.sha256()
        contents = overlapped(fetches(), limit_count=CHUNKS_UNDER_WAY_COUNT)
        async with contextlib.aclosing(contents):
            for index, digest in enumerate(manifest.digests):
                content = await anext(contents)
                if content is None:
                    raise ObjectChanged(keys.url, f"chunk {index} of {len(names)} is gone")
                if (await next_chunk(content, whole)).digest != digest:
                    if not self._read_only:
                        await chunks.report_damage(names[index])
                    raise ObjectChanged(keys.url, f"chunk {index} of {len(names)} is damaged")
                yield content

    async def info(self, bucket: str, name: str) -> ObjectInfo | None:
        """As `ObjectStore.info`."""
        keys = ObjectKeys(self._prefix, bucket, name)
        return info_of_fields(await self._client.execute("HMGET", keys.current, *INFO_FIELDS), keys)

    async def holds(self, bucket: str, name: str, sha256: str) -> bool:
        """As `ObjectStore.holds`: every chunk exists, and no reader has found one of them damaged."""
        keys = ObjectKeys(self._prefix, bucket, name)
        try:
            manifest = await self._manifest(keys)
        except ObjectChanged:
            return False
        if manifest is None or manifest.sha256 != sha256:
            return False
        return await self._chunks(keys).are_whole(manifest.chunks)

    async def _manifest(self, keys: ObjectKeys) -> Manifest | None:
        fields = await self._client.execute("HGETALL", keys.current)
        return Manifest.of_fields(fields, keys.url) if fields else None

    async def _replaceable(self, keys: ObjectKeys) -> Replaceable | None:
        return Replaceable.of_fields(await self._client.execute("HGETALL", keys.current))

    def _chunks(self, keys: ObjectKeys) -> ObjectChunks:
        return ObjectChunks(self._client, keys, self._times)

    async def _recovering(self, call: Callable[[], Awaitable[T]]) -> T:
        return await recovering(self._client, self._times.recovery_s, call)

    # ------------------------------------------------------------------ list and remove

    async def list(
        self, bucket: str | None = None, *, on_left_out: Callable[[str], None] | None = None
    ) -> list[ObjectInfo]:
        """As `ObjectStore.list`. A name or a manifest that cannot be read is left out."""
        leave_out = on_left_out or partial(log.warning, "left out of the list: %s")
        entries: list[tuple[ObjectKeys, bytes, bytes]] = []
        for path, score in (await self._all_names()).items():
            try:
                keys = ObjectKeys.of_path(self._prefix, path.decode())
            except ValueError as exc:
                leave_out(f"{path[:80]!r} is not the name of an object: {exc}")
                continue
            if bucket is None or keys.bucket == bucket:
                entries.append((keys, path, score))
        found: list[ObjectInfo] = []
        unused: list[tuple[bytes, bytes]] = []
        for start in range(0, len(entries), _KEYS_A_CALL):
            part = entries[start : start + _KEYS_A_CALL]
            pointers = await self._pointers([keys for keys, _, _ in part])
            for (keys, path, score), values in zip(part, pointers, strict=True):
                try:
                    if isinstance(values, StoreRefused):
                        raise values
                    info = info_of_fields(values, keys)
                except StoreError as exc:
                    leave_out(str(exc))
                    continue
                if info is not None:
                    found.append(info)
                else:
                    unused.append((path, score))
        if unused and not self._read_only:
            # An older name without an object cannot belong to a put under way.
            limit = await self._server_time_s() - _FORGET_AFTER_S
            for start in range(0, len(unused), _KEYS_A_CALL):
                old = [pair for pair in unused[start : start + _KEYS_A_CALL] if float(pair[1]) < limit]
                if old:
                    await self._client.script(_FORGET, [self._names], [word for pair in old for word in pair])
        return sorted(found, key=lambda info: (info.bucket, info.name))

    async def _all_names(self) -> dict[bytes, bytes]:
        """Read the index, name → score, page by page. A name that is added meanwhile may be missed."""
        names: dict[bytes, bytes] = {}
        cursor = b"0"
        while True:
            cursor, page = await self._client.execute("ZSCAN", self._names, cursor, "COUNT", _KEYS_A_CALL)
            names.update(zip(page[::2], page[1::2], strict=True))
            if cursor == b"0":
                return names

    async def _pointers(self, objects: Sequence[ObjectKeys]) -> Sequence[_Pointer]:
        """Read the fields for a listing from each pointer; an error in place of a key of another Redis
        type."""
        commands = [("HMGET", keys.current, *INFO_FIELDS) for keys in objects]
        try:
            return await self._client.pipeline(commands)
        except StoreRefused:
            found = []
            for command in commands:
                try:
                    found.append(await self._client.execute(*command))
                except StoreRefused as exc:
                    found.append(exc)
            return found

    async def remove(self, bucket: str, name: str) -> bool:
        """As `ObjectStore.remove`. Readers of the object can finish. A listing later drops its name from the
        index."""
        keys = ObjectKeys(self._prefix, bucket, name)
        for _ in range(_COMMIT_TRIES):
            old = await self._replaceable(keys)
            if old is None:
                return False
            chunks = keys.chunks(old.chunks)
            if await self._client.script(
                _REMOVE, [keys.current, *chunks], [old.version, self._times.expiry_ms]
            ):
                return True
        raise StoreUnavailable(f"{keys.url} is replaced all the time by other puts; remove it again later")

    @property
    def _names(self) -> str:
        return f"{{{self._prefix}/object}}:names"

    async def _server_time_s(self) -> int:
        seconds, _ = await self._client.execute("TIME", beside=self._names)
        return int(seconds)

    async def aclose(self) -> None:
        """Close the connections. Never raises for a dead server."""
        await self._client.aclose()
