"""The collector of garbage: reads all keys of a deployment, judges them, and removes what no process needs.

It runs beside the deployment. The keys are read page by page, with pauses. Each removal is one script, which
checks again on the server that its keys are still what they were: nothing that was put, appended or read
lately goes, and no key that has another owner meanwhile. Keys of unknown form are reported and never touched.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dynamo_redis.errors import StoreRefused
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.garbage.in_use import InUse
from dynamo_redis.store.garbage.parts import Key, Place, place_key
from dynamo_redis.store.garbage.survey import Finding, Kind, Survey
from dynamo_redis.store.keys import ObjectKeys, RegistryKeys, StreamKeys, key_patterns
from dynamo_redis.store.objects.chunks import EXPIRY_S
from dynamo_redis.store.objects.manifest import Replaceable
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.scripts import load_script

LEAST_GRACE_S: Final = EXPIRY_S
"""Shortest grace: a worker registers its card within this time after the upload of its files."""

PAGE_KEYS_COUNT: Final = 500
PAUSE_S: Final = 0.005
"""Pause after each page, so that a survey takes a small part of the server's time."""

_CHUNKS_A_CALL: Final = 500
_STREAM_MAJOR: Final = "1"
_EXPIRY_MS: Final = round(EXPIRY_S * 1000)

_OBJECT = load_script("garbage_object")
_SCRIPTS: Final = {
    Kind.MODEL_FILES: _OBJECT,
    Kind.SNAPSHOTS: _OBJECT,
    Kind.CHUNKS: load_script("garbage_chunks"),
    Kind.TEMPORARY: load_script("garbage_expire"),
    Kind.LOCKS: load_script("garbage_fence"),
    Kind.STREAMS: load_script("garbage_stream"),
}

Command = Sequence[str | int]


@dataclass(frozen=True, slots=True)
class Buckets:
    """The buckets whose objects can be judged: model files, and snapshots of routers. Others are kept."""

    models: str
    snapshots: str


class Collector:
    """Surveys and removals of one deployment, on a client that its caller closes."""

    def __init__(self, client: StoreClient, prefix: str, buckets: Buckets, *, grace_s: float) -> None:
        self._client = client
        self._prefix = prefix
        self._buckets = buckets
        self._grace_ms = round(grace_s * 1000)
        self._meta = RegistryKeys(prefix).meta

    # ------------------------------------------------------------------ survey

    async def survey(self, in_use: InUse) -> Survey:
        """Read all keys; return what is garbage, given what the registry names. Raises StoreError."""
        survey = Survey(unreadable=list(in_use.unreadable))
        pointers: list[Key] = []
        fences: list[Key] = []
        streams: set[StreamName] = set()
        lasting: defaultdict[str, set[str]] = defaultdict(set)
        async for page in self._pages(survey):
            pointers += (key for key in page if key.place == Place.POINTER)
            fences += (key for key in page if key.place == Place.FENCE)
            streams |= {key.stream for key in page if key.stream is not None}
            for key in await self._without_expiry(page, survey):
                if key.place == Place.CHUNK:
                    lasting[key.path].add(key.name)
                else:
                    arguments = (round(key.ttl_s * 1000),)
                    survey.findings.append(Finding(Kind.TEMPORARY, key.key, 0, (key.key,), arguments))
        now_ms = await self._now_ms()
        removed = await self._judge_objects(pointers, in_use, now_ms, survey)
        await self._judge_chunks(lasting, survey)
        await self._judge_fences(fences, removed, now_ms, survey)
        await self._judge_streams(streams, in_use, now_ms, survey)
        survey.sort()
        return survey

    async def _pages(self, survey: Survey) -> AsyncIterator[list[Key]]:
        """Yield all known keys, page by page, each key once a page; count the others."""
        unknown: set[bytes] = set()
        for pattern in key_patterns(self._prefix):
            page: dict[bytes, Key] = {}
            async for raw in self._client.scan(pattern, count=PAGE_KEYS_COUNT):
                survey.keys_count += 1
                key = place_key(self._prefix, raw.decode("utf-8", "surrogateescape"))
                if key is not None:
                    page[raw] = key
                elif raw not in unknown:
                    unknown.add(raw)
                    survey.add_unknown(raw.decode("utf-8", "backslashreplace"))
                if len(page) >= PAGE_KEYS_COUNT:
                    yield list(page.values())
                    page.clear()
                    await asyncio.sleep(PAUSE_S)
            yield list(page.values())

    async def _without_expiry(self, page: Sequence[Key], survey: Survey) -> list[Key]:
        """Return the chunks and temporary keys of a page that have no expiry."""
        asked = [key for key in page if key.place in (Place.CHUNK, Place.TEMPORARY)]
        ttls = await self._each([("PTTL", key.key) for key in asked], survey)
        return [key for key, ttl_ms in zip(asked, ttls, strict=True) if ttl_ms == -1]

    async def _judge_objects(
        self, pointers: Sequence[Key], in_use: InUse, now_ms: int, survey: Survey
    ) -> set[str]:
        """Add the objects that no process needs. Return their paths."""
        candidates: list[tuple[Kind, ObjectKeys]] = []
        for pointer in pointers:
            try:
                keys = ObjectKeys.of_path(self._prefix, pointer.path)
            except ValueError:
                survey.add_unknown(pointer.key)
                continue
            kind = self._kind_of(keys)
            if kind is None:
                survey.other_objects_count += 1
            elif not self._is_used(kind, keys, in_use):
                candidates.append((kind, keys))
        fields = ("version", "size_bytes", "created_at_ms", "put_at_ms")
        answers = await self._each([("HMGET", keys.current, *fields) for _, keys in candidates], survey)
        removed: set[str] = set()
        for (kind, keys), answer in zip(candidates, answers, strict=True):
            if answer is None or answer[0] is None:
                continue
            put_at_ms = max(_number(answer[2]), _number(answer[3]))
            if now_ms - put_at_ms >= self._grace_ms:
                version = answer[0].decode("utf-8", "replace")
                lock = f"{{{self._prefix}/object/{keys.path}}}:lock"
                finding = Finding(
                    kind, f"{keys.bucket}/{keys.name}", _number(answer[1]), (keys.current, lock), (version,)
                )
                survey.findings.append(finding)
                removed.add(keys.path)
        return removed

    def _kind_of(self, keys: ObjectKeys) -> Kind | None:
        if keys.bucket == self._buckets.models:
            return Kind.MODEL_FILES
        if keys.bucket == self._buckets.snapshots and StreamName.of_path(keys.name) is not None:
            return Kind.SNAPSHOTS
        return None

    def _is_used(self, kind: Kind, keys: ObjectKeys, in_use: InUse) -> bool:
        """Return whether an object is needed, or may be: a record that cannot be read may name it."""
        if kind == Kind.MODEL_FILES:
            return bool(in_use.unreadable) or keys.url in in_use.urls
        stream = StreamName.of_path(keys.name)
        return stream is None or (stream.namespace, stream.component) in in_use.components

    async def _judge_chunks(self, lasting: dict[str, set[str]], survey: Survey) -> None:
        """Add the chunks without an expiry that the current version of their object does not have."""
        paths = list(lasting)
        for start in range(0, len(paths), 50):  # the digests of large objects are long
            part = paths[start : start + 50]
            pointers = [f"{{{self._prefix}/object/{path}}}:current" for path in part]
            answers = await self._each([("HGET", pointer, "chunks") for pointer in pointers], survey)
            for path, pointer, digests in zip(part, pointers, answers, strict=True):
                known = set((digests or b"").decode("utf-8", "replace").split())
                orphans = sorted(name for name in lasting[path] if _digest(name) not in known)
                for first in range(0, len(orphans), _CHUNKS_A_CALL):
                    names = orphans[first : first + _CHUNKS_A_CALL]
                    keys = [f"{{{self._prefix}/object/{path}}}:chunk:{name}" for name in names]
                    sizes = await self._each([("STRLEN", key) for key in keys], survey)
                    size_bytes = sum(size or 0 for size in sizes)
                    arguments: tuple[str | int, ...] = (_EXPIRY_MS, *map(_digest, names))
                    survey.findings.append(
                        Finding(Kind.CHUNKS, path, size_bytes, (pointer, *keys), arguments, len(names))
                    )

    async def _judge_fences(
        self, fences: Sequence[Key], removed: set[str], now_ms: int, survey: Survey
    ) -> None:
        """Add the fences of locks that have long not been held and protect nothing."""
        needed_by = [
            [f"{fence.tag}:lock", f"{fence.tag}:value", *([f"{fence.tag}:current"] if fence.path else [])]
            for fence in fences
        ]
        tokens = await self._each([("GET", fence.key) for fence in fences], survey)
        # A pointer that is to be removed does not count.
        asked = [
            [key for key in keys if not (key.endswith(":current") and fence.path in removed)]
            for fence, keys in zip(fences, needed_by, strict=True)
        ]
        counts = await self._each([("EXISTS", *keys) for keys in asked], survey)
        for fence, keys, token, count in zip(fences, needed_by, tokens, counts, strict=True):
            age_ms = now_ms - _number(token) // 1000
            if token is not None and count == 0 and age_ms >= self._grace_ms:
                survey.findings.append(
                    Finding(Kind.LOCKS, fence.tag, len(token), (fence.key, *keys), (self._grace_ms,))
                )

    async def _judge_streams(
        self, streams: set[StreamName], in_use: InUse, now_ms: int, survey: Survey
    ) -> None:
        """Add the streams of components without workers and routers that have rested for the grace."""
        left = [name for name in streams if (name.namespace, name.component) not in in_use.components]
        keys = [StreamKeys(self._prefix, name) for name in left]
        heads = await self._each([("HMGET", each.meta, "v", "seen", "bytes") for each in keys], survey)
        lasts = await self._each([("XREVRANGE", each.events, "+", "-", "COUNT", 1) for each in keys], survey)
        for name, each, head, last in zip(left, keys, heads, lasts, strict=True):
            if head is None or last is None or (head[0] or b"1").partition(b".")[0] != b"1":
                continue
            entry_ms = _number(last[0][0].partition(b"-")[0]) if last else 0
            if now_ms - max(_number(head[1]), entry_ms) >= self._grace_ms:
                arguments = (_STREAM_MAJOR, self._grace_ms)
                survey.findings.append(
                    Finding(Kind.STREAMS, name.path, _number(head[2]), each.all, arguments)
                )

    # ------------------------------------------------------------------ removal

    async def remove(self, finding: Finding) -> int:
        """Remove a finding if it is still garbage. Return the number of keys or objects that went.

        Raises StoreError."""
        keys, arguments = finding.keys, finding.arguments
        if finding.kind in (Kind.MODEL_FILES, Kind.SNAPSHOTS):
            old = Replaceable.of_fields(await self._client.execute("HGETALL", keys[0]))
            if old is None:
                return 0
            tag = keys[0].removesuffix(":current")
            keys += tuple(f"{tag}:chunk:{name}" for name in old.chunks)
            arguments += (self._grace_ms, _EXPIRY_MS)
        return int(await self._client.script(_SCRIPTS[finding.kind], keys, arguments))

    # ------------------------------------------------------------------ helpers

    async def _each(self, commands: Sequence[Command], survey: Survey) -> list[Any]:
        """Run commands page by page; None, and a note, for one that is refused: its key has another type."""
        answers: list[Any] = []
        for start in range(0, len(commands), PAGE_KEYS_COUNT):
            page = commands[start : start + PAGE_KEYS_COUNT]
            try:
                answers += await self._client.pipeline(page)
            except StoreRefused:
                answers += [await self._asked(command, survey) for command in page]
        return answers

    async def _asked(self, command: Command, survey: Survey) -> Any:
        try:
            return await self._client.execute(*command)
        except StoreRefused as exc:
            if exc.answer_code != "WRONGTYPE":
                raise
            survey.unreadable.append(str(exc))
            return None

    async def _now_ms(self) -> int:
        seconds, micros = await self._client.execute("TIME", beside=self._meta)
        return int(seconds) * 1000 + int(micros) // 1000


def _digest(name: str) -> str:
    """Return the digest in a chunk's name, `<chunk_bytes>:<sha256>`."""
    return name.rpartition(":")[2]


def _number(text: bytes | None) -> int:
    return int(text) if text and text.isdigit() else 0
