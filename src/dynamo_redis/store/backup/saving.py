"""Saving a deployment's records and objects to a backup."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass, field

from dynamo_redis.errors import InvalidRecord, ObjectChanged, ObjectNotFound
from dynamo_redis.store.backup.archive import BackupWriter
from dynamo_redis.store.base import ObjectInfo, ObjectStore, Progress, Snapshot

_TRIES = 3
"""How often an object is read that is replaced meanwhile."""


@dataclass(slots=True)
class Saved:
    """`left_out` has a sentence for each record and object that could not be read."""

    records_count: int = 0
    leased_count: int = 0
    objects_count: int = 0
    objects_bytes: int = 0
    left_out: list[str] = field(default_factory=list)


async def save(
    writer: BackupWriter,
    snapshot: Snapshot,
    objects: ObjectStore | None,
    *,
    without_buckets: Collection[str],
    with_leased: bool,
    progress: Progress | None = None,
) -> Saved:
    """Write a registry's records, and all objects but those of some buckets, each verified.

    `objects` None: no objects. Records with a lease are written too if `with_leased`. Raises StoreError and
    OSError.
    """
    saved = Saved(left_out=[str(error) for error in snapshot.invalid])
    records = [record for record in snapshot.records if with_leased or record.lease is None]
    writer.add_records(records)
    saved.leased_count = sum(record.lease is not None for record in records)
    saved.records_count = len(records) - saved.leased_count
    if objects is None:
        return saved
    listed = await objects.list(on_left_out=saved.left_out.append)
    infos = [info for info in listed if info.bucket not in without_buckets]
    total_bytes = sum(info.size_bytes for info in infos)
    for info in infos:
        found = await _save_object(writer, objects, info, saved)
        if found is not None:
            saved.objects_count += 1
            saved.objects_bytes += found.size_bytes
        if progress is not None:
            progress(saved.objects_bytes, total_bytes)
    return saved


async def _save_object(
    writer: BackupWriter, objects: ObjectStore, info: ObjectInfo, saved: Saved
) -> ObjectInfo | None:
    """Write an object, from its beginning again if it is replaced meanwhile. Return what was written; None if
    it was removed, or cannot be read."""
    reason = ""
    for _ in range(_TRIES):
        found = await objects.info(info.bucket, info.name)
        if found is None:
            return None
        try:
            with writer.add_object(found) as write:
                async with aclosing(objects.get(info.bucket, info.name)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        write(piece)
            return found
        except ObjectNotFound:
            return None
        except (ObjectChanged, InvalidRecord) as exc:
            reason = str(exc)
    saved.left_out.append(reason)
    return None
