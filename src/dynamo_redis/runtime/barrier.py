"""A leader/worker barrier: one leader hands out data, and all go on together once every worker has it.

Under `v1/barrier/<id>/` stand `data` (the leader's, exclusive), `workers/<worker id>` (each worker's,
exclusive) and, at the end, `complete` or `abort` (the leader's). All die with their owner's lease, so a
barrier that was left behind disappears by itself and its id can be used again.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from dynamo_redis.errors import BarrierError, KeyExists
from dynamo_redis.names import barrier_prefix, decode_segment, encode_segment
from dynamo_redis.store.base import Put, Registration, Registry, WatchBatch

_DATA, _WORKERS, _COMPLETE, _ABORT = "data", "workers/", "complete", "abort"


class LeaderBarrier:
    """The leader's side. The barrier stands until `aclose`, or until the leader's lease ends."""

    def __init__(self, barrier_id: str, worker_count: int, timeout_s: float) -> None:
        """Wait for `worker_count` workers, at most `timeout_s` seconds."""
        self._prefix = barrier_prefix(barrier_id)
        self._barrier_id = barrier_id
        self._worker_count = worker_count
        self._timeout_s = timeout_s
        self._registrations: list[Registration] = []

    async def sync(self, registry: Registry, data: Any) -> list[str]:
        """Publish `data` (JSON), wait for all workers, let them go; answer their ids, sorted.

        Raises BarrierError: a leader of that id is there already, or not all came in time. The workers that
        wait are told so. Raises StoreError.
        """
        await self._publish(registry, _DATA, json.dumps(data).encode())
        try:
            workers = await self._wait_for_workers(registry)
        except BaseException as exc:
            reason = str(exc) if isinstance(exc, BarrierError) else "the leader stopped waiting"
            await self._publish(registry, _ABORT, json.dumps(reason).encode())
            raise
        await self._publish(registry, _COMPLETE, b"true")
        return workers

    async def aclose(self) -> None:
        """Take the barrier down. Workers that come later wait for a new leader of that id."""
        while self._registrations:
            await self._registrations.pop().unregister()

    async def _publish(self, registry: Registry, name: str, value: bytes) -> None:
        try:
            registration = await registry.register(self._prefix + name, value, exclusive=True)
        except KeyExists:
            raise BarrierError(f"barrier {self._barrier_id!r} has a leader already") from None
        self._registrations.append(registration)

    async def _wait_for_workers(self, registry: Registry) -> list[str]:
        prefix = self._prefix + _WORKERS
        present: set[str] = set()
        try:
            async with asyncio.timeout(self._timeout_s), registry.watch(prefix) as watch:
                async for batch in watch:
                    for event in batch.events:
                        if isinstance(event, Put):
                            present.add(decode_segment(event.record.key.removeprefix(prefix)))
                        else:
                            present.discard(decode_segment(event.key.removeprefix(prefix)))
                    if len(present) >= self._worker_count:
                        return sorted(present)
        except TimeoutError:
            raise BarrierError(
                f"barrier {self._barrier_id!r}: {len(present)} of {self._worker_count} workers came "
                f"within {self._timeout_s} s"
            ) from None
        raise BarrierError(f"barrier {self._barrier_id!r}: the registry was closed")


class WorkerBarrier:
    """A worker's side. `sync` returns the leader's data once all workers are there."""

    def __init__(self, barrier_id: str, worker_id: str, timeout_s: float | None = None) -> None:
        """Join as `worker_id`, unique within the barrier; wait at most `timeout_s` seconds, or for ever."""
        self._prefix = barrier_prefix(barrier_id)
        self._barrier_id = barrier_id
        self._worker_id = worker_id
        self._timeout_s = timeout_s
        self._registration: Registration | None = None

    async def sync(self, registry: Registry) -> Any:
        """Wait for the leader's data, say that this worker is there, wait for the others; answer the data.

        Raises BarrierError: another worker has this id, the leader gave up or vanished, or the time is over;
        this worker is then no longer counted. Raises StoreError.
        """
        key = f"{self._prefix}{_WORKERS}{encode_segment(self._worker_id)}"
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._join(registry, key)
        except TimeoutError:
            await self.aclose()
            raise BarrierError(
                f"barrier {self._barrier_id!r} was not complete within {self._timeout_s} s"
            ) from None
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Leave the barrier."""
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.unregister()

    async def _join(self, registry: Registry, key: str) -> Any:
        standing: dict[str, bytes] = {}
        async with registry.watch(self._prefix) as watch:
            async for batch in watch:
                self._apply(standing, batch)
                if _ABORT in standing:
                    raise BarrierError(
                        f"barrier {self._barrier_id!r} was aborted: {json.loads(standing[_ABORT])}"
                    )
                if _DATA in standing and self._registration is None:
                    self._registration = await self._register(registry, key)
                if _COMPLETE in standing and _DATA in standing:
                    return json.loads(standing[_DATA])
        raise BarrierError(f"barrier {self._barrier_id!r}: the registry was closed")

    def _apply(self, standing: dict[str, bytes], batch: WatchBatch) -> None:
        for event in batch.events:
            if isinstance(event, Put):
                standing[event.record.key.removeprefix(self._prefix)] = event.record.value
                continue
            name = event.key.removeprefix(self._prefix)
            standing.pop(name, None)
            if name == _DATA and self._registration is not None and batch.resync is None:
                raise BarrierError(f"barrier {self._barrier_id!r}: the leader is gone")

    async def _register(self, registry: Registry, key: str) -> Registration:
        try:
            return await registry.register(key, b"true", exclusive=True)
        except KeyExists:
            raise BarrierError(
                f"barrier {self._barrier_id!r} has a worker {self._worker_id!r} already"
            ) from None
