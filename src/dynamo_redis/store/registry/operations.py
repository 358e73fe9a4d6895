"""Reads and plain writes of a registry, on any `Storage`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dynamo_redis.errors import KeyExists, RevisionMismatch, StoreUnavailable
from dynamo_redis.store.base import Compare, DeleteOp, LeaseId, PutOp, Record, Revision, Snapshot
from dynamo_redis.store.keys import check_key, check_prefix, check_transaction, check_value
from dynamo_redis.store.redis.deadline import Deadline
from dynamo_redis.store.registry.change_log import Position
from dynamo_redis.store.registry.scripts_api import CompareFailed, LeaseState, Operation, Written


class Storage(Protocol):
    """The storage of a registry: Redis (`scripts_api.KeyValue`) or this process (`memory.MemoryStorage`)."""

    @property
    def timeout_s(self) -> float:
        """Longest wait for one answer."""
        ...

    async def pause(self, wait_s: float) -> None:
        """Wait before another attempt; the wait may end early when that is likely to succeed."""
        ...

    async def read(self, keys: Sequence[str], lease: LeaseId | None = None) -> LeaseState: ...

    async def snapshot(self, prefix: str) -> tuple[Snapshot, Position]: ...

    async def write(
        self,
        operations: Sequence[Operation],
        *,
        compares: Sequence[Compare] = (),
        incarnation: str = "",
        lease: LeaseId | None = None,
        ttl_s: float = 0.0,
        operation: str | None = None,
    ) -> Written: ...


class KeyOperations:
    """The part of `base.Registry` that needs neither a lease nor a reader."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def get(self, key: str) -> Record | None:
        found = await self._storage.read([check_key(key)])
        if key in found.invalid:
            raise found.invalid[key]
        return found.records.get(key)

    async def get_prefix(self, prefix: str) -> Snapshot:
        snapshot, _ = await self._storage.snapshot(check_prefix(prefix))
        return snapshot

    async def put(self, key: str, value: bytes) -> Revision:
        return (await self._write([PutOp(key, value)])).revision

    async def create(self, key: str, value: bytes) -> Revision:
        try:
            return (await self._write([PutOp(key, value)], [Compare(key, None)])).revision
        except CompareFailed as exc:
            raise KeyExists(key) from exc

    async def create_or_validate(self, key: str, value: bytes) -> Revision:
        try:
            return (await self._write([PutOp(key, value)], [Compare(key, None)])).revision
        except CompareFailed as exc:
            if exc.found is None or exc.found.value != value:
                raise KeyExists(key) from exc
            return exc.found.mod_revision

    async def compare_and_put(self, key: str, value: bytes, expected: Revision | None) -> Revision:
        return await self.transact([Compare(key, expected)], [PutOp(key, value)])

    async def delete(self, key: str) -> bool:
        return (await self._write([DeleteOp(key)])).change_count > 0

    async def transact(self, compares: Sequence[Compare], ops: Sequence[PutOp | DeleteOp]) -> Revision:
        try:
            return (await self._write(ops, compares)).revision
        except CompareFailed as exc:
            failed = compares[exc.index]
            found = exc.found.mod_revision if exc.found else None
            raise RevisionMismatch(failed.key, failed.mod_revision, found) from exc

    async def _write(self, ops: Sequence[PutOp | DeleteOp], compares: Sequence[Compare] = ()) -> Written:
        for item in (*ops, *compares):
            check_key(item.key)
            if isinstance(item, PutOp):
                check_value(item.value)
        value_bytes = sum(len(op.value) for op in ops if isinstance(op, PutOp))
        check_transaction(len(ops) + len(compares), value_bytes)
        try:
            async with Deadline(self._storage.timeout_s):
                return await self._storage.write(ops, compares=compares)
        except TimeoutError as exc:
            raise StoreUnavailable("the registry does not answer in time") from exc
