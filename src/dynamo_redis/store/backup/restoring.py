"""Restoring a backup into a registry and an object store. It can be repeated: it writes what is not there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Literal

from dynamo_redis.errors import InvalidRecord, KeyExists
from dynamo_redis.store.backup.archive import BackupReader, StoredObject, StoredRecord
from dynamo_redis.store.base import ObjectStore, Progress, Registry

OnConflict = Literal["fail", "keep", "replace"]
"""What to do with a key or an object that exists with other content."""


@dataclass(slots=True)
class Restored:
    """How many records and objects were written, were there already, and were kept as they were."""

    records_count: int = 0
    objects_count: int = 0
    same_count: int = 0
    kept_count: int = 0
    leased_count: int = 0
    """Records that belong to processes, and so are not restored."""


class Conflict(InvalidRecord):
    """Content that is to be restored differs from what exists, and the caller wants neither lost."""

    code = "conflict"

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


class Restoration:
    """One restoration of a verified backup."""

    def __init__(
        self,
        reader: BackupReader,
        registry: Registry,
        objects: ObjectStore,
        *,
        with_objects: bool,
        on_conflict: OnConflict,
    ) -> None:
        self._reader = reader
        self._registry = registry
        self._objects = objects
        self._wanted = reader.objects if with_objects else ()
        self._on_conflict = on_conflict
        self.done = Restored()

    async def check_conflicts(self) -> None:
        """Raise Conflict if something exists with other content, and the caller wants to fail then.

        Writes nothing. Raises StoreError."""
        if self._on_conflict != "fail":
            return
        present = {each.key: each.value for each in (await self._registry.get_prefix("")).records}
        found = [
            f"key {record.key}"
            for record in self._lasting()
            if record.key in present and present[record.key] != record.value
        ]
        for stored in self._wanted:
            info = await self._objects.info(stored.bucket, stored.name)
            if info is not None and info.sha256 != stored.sha256:
                found.append(f"object {stored.path}")
        if found:
            raise _conflict(found)

    async def run(self, progress: Progress | None = None) -> Restored:
        """Write the objects, then the records, which may name them. Raises StoreError, InvalidRecord."""
        total_bytes = sum(each.size_bytes for each in self._wanted)
        done_bytes = 0
        for stored in self._wanted:
            await self._restore_object(stored)
            done_bytes += stored.size_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        for record in self._lasting():
            await self._restore_record(record)
        self.done.leased_count = sum(record.lease is not None for record in self._reader.records())
        return self.done

    def _lasting(self) -> Iterator[StoredRecord]:
        return (record for record in self._reader.records() if record.lease is None)

    async def _restore_object(self, stored: StoredObject) -> None:
        bucket, name = stored.bucket, stored.name
        if await self._objects.holds(bucket, name, stored.sha256):
            self.done.same_count += 1
            return
        info = await self._objects.info(bucket, name)
        if info is not None and info.sha256 != stored.sha256:
            if self._on_conflict == "fail":
                raise _conflict([f"object {stored.path}"])
            if self._on_conflict == "keep":
                self.done.kept_count += 1
                return

        async def pieces() -> AsyncIterator[bytes]:
            for piece in self._reader.pieces(stored):
                yield piece

        put = await self._objects.put(bucket, name, pieces())
        if put.sha256 != stored.sha256:
            raise InvalidRecord("the file that was verified", "it has changed since", key=stored.member)
        self.done.objects_count += 1

    async def _restore_record(self, record: StoredRecord) -> None:
        present = await self._registry.get(record.key)
        if present is not None and present.value == record.value:
            self.done.same_count += 1
            return
        if self._on_conflict == "replace":
            await self._registry.put(record.key, record.value)
        else:
            try:
                await self._registry.create(record.key, record.value)
            except KeyExists as exc:
                if self._on_conflict == "fail":
                    raise _conflict([f"key {record.key}"]) from exc
                self.done.kept_count += 1
                return
        self.done.records_count += 1


def _conflict(found: list[str]) -> Conflict:
    shown = ", ".join(found[:3]) + f" and {len(found) - 3} more" * (len(found) > 3)
    remedy = "--on-conflict keep leaves them as they are, replace restores them"
    return Conflict("a backup to restore", f"exists with other content: {shown}", remedy=remedy)
