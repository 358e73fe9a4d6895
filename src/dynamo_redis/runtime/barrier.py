"""A leader/worker barrier: one leader hands out data, and all go on together once every worker has it.

Under `v1/barrier/<id>/` stand JSON records, each exclusive and each with the barrier's `round`:

    data              the leader's: `data`
    workers/<id>      each worker's: its `token`
    complete          the leader's, at the end: the `workers` that were counted, id → token
    abort             the leader's instead, if it gives up: the `reason`

The round is a random id that the leader makes. It keeps apart what successive barriers of one id leave
behind: a worker of an earlier round is not counted, and no earlier leader's end is taken for this one's. The
token, random too, keeps apart workers of one id: who takes the place of one that was counted and has gone on
was not counted. All keys die with their owner's lease. While Redis is away both sides wait, as long as their
time-outs allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, Self

from dynamo_redis.errors import BarrierError, KeyExists, StoreError, StoreUnavailable
from dynamo_redis.names import barrier_prefix, decode_segment, encode_segment
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import (
    Delete,
    DeleteCause,
    LostReason,
    Put,
    Registration,
    Registry,
    Watch,
    WatchBatch,
)

log = logging.getLogger(__name__)

_DATA, _WORKERS, _COMPLETE, _ABORT = "data", "workers/", "complete", "abort"
_VERSION: Final = 1
_RETRY_S: Final = 0.2
_LOST_LEADER: Final[Mapping[LostReason, str]] = {
    "conflict": "another leader has taken its place",
    "deleted": "somebody has deleted it",
}
GRACE_S: Final = 2.0
"""How much longer than its lease somebody who died, or lost the registry's data, is waited for."""


class LeaderBarrier:
    """The leader's side. The barrier stands until `aclose` (or the end of `async with`), or until the
    leader's lease ends: workers that come meanwhile learn how it ended."""

    def __init__(self, barrier_id: str, worker_count: int, timeout_s: float) -> None:
        """Wait for `worker_count` workers, at most `timeout_s` seconds."""
        self._prefix = barrier_prefix(barrier_id)
        self._name = f"barrier {barrier_id!r}"
        self._worker_count = worker_count
        self._timeout_s = timeout_s
        self._round = ""
        self._registrations: list[Registration] = []
        self._wait = _Wait()

    async def sync(self, registry: Registry, data: Any) -> list[str]:
        """Publish `data` (JSON), wait for all workers, let them go; answer their ids, sorted.

        The ids are the first `worker_count` that came; a worker that dies or gives up at that very moment may
        be among them. A leader of the same id that died is outwaited: its lease has to end first.

        Raises BarrierError: a leader of that id is there and stays, another took the id after Redis lost its
        data, or not all workers came in time. The workers that wait are told so. Raises StoreError; after
        StoreUnavailable some workers may have been let go.
        """
        self._round = secrets.token_hex(8)
        self._wait = _Wait()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        await self._publish(registry, _DATA, {"data": data}, deadline)
        try:
            workers = await self._wait_for_workers(registry, deadline)
            await self._publish(registry, _COMPLETE, {"workers": workers}, deadline)
        except BaseException as exc:
            reason = str(exc) if isinstance(exc, BarrierError) else "the leader stopped waiting"
            await self._abort(registry, reason)
            raise
        return sorted(workers)

    async def aclose(self) -> None:
        """Take the barrier down. Workers that come later wait for a new leader of that id."""
        registrations, self._registrations = self._registrations, []
        await withdraw(reversed(registrations))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _publish(
        self, registry: Registry, name: str, fields: Mapping[str, Any], deadline: float
    ) -> None:
        value = _encode(self._round, fields)
        taken = f"{self._name} has a leader already"
        key = self._prefix + name
        registration = await _claim(registry, key, value, deadline, taken, self._wait.on_lost)
        self._registrations.append(registration)

    async def _abort(self, registry: Registry, reason: str) -> None:
        """Tell the workers. What cannot be published they learn when the leader's own key goes."""
        value = _encode(self._round, {"reason": reason})
        try:
            registration = await registry.register(self._prefix + _ABORT, value, exclusive=True)
        except StoreError as exc:
            log.warning("%s: could not be aborted in the registry, taking it down: %s", self._name, exc)
            await self.aclose()
        else:
            self._registrations.append(registration)

    async def _wait_for_workers(self, registry: Registry, deadline: float) -> dict[str, str]:
        """The first `worker_count` workers: id → token."""
        present: dict[str, str] = {}
        prefix = self._prefix + _WORKERS
        try:
            async with self._wait.until(deadline), registry.watch(prefix) as watch:
                async for batch in watch:
                    for event in batch.events:
                        self._count(present, event)
                    if len(present) >= self._worker_count:
                        return dict(itertools.islice(present.items(), self._worker_count))
        except TimeoutError:
            if self._wait.lost is not None:
                raise BarrierError(f"{self._name}: {_LOST_LEADER[self._wait.lost]}") from None
            raise BarrierError(
                f"{self._name}: {len(present)} of {self._worker_count} workers came "
                f"within {self._timeout_s} s"
            ) from None
        raise BarrierError(f"{self._name}: the registry was closed")

    def _count(self, present: dict[str, str], event: Put | Delete) -> None:
        """Note who is there of this round, in the order in which they came."""
        key = event.record.key if isinstance(event, Put) else event.key
        worker_id = decode_segment(key.removeprefix(self._prefix + _WORKERS))
        record = _decode(event.record.value) if isinstance(event, Put) else {}
        if record.get("round") == self._round:
            present[worker_id] = record.get("token", "")
        else:
            present.pop(worker_id, None)


class WorkerBarrier:
    """A worker's side. `sync` returns the leader's data once all workers are there."""

    def __init__(self, barrier_id: str, worker_id: str, timeout_s: float | None = None) -> None:
        """Join as `worker_id`, unique within the barrier; wait at most `timeout_s` seconds, or for ever."""
        self._prefix = barrier_prefix(barrier_id)
        self._name = f"barrier {barrier_id!r}"
        self._worker_id = worker_id
        self._timeout_s = timeout_s
        self._token = ""
        self._registration: Registration | None = None
        self._wait = _Wait()

    async def sync(self, registry: Registry) -> Any:
        """Wait for the leader's data, say that this worker is there, wait for the others; answer the data.

        Returns only if the leader has counted this worker. A worker of the same id that died is outwaited:
        its lease has to end first. When Redis has lost its data, the leader has as long to publish its own
        again.

        Raises BarrierError: another worker has this id, the leader gave up, vanished or was replaced, the
        barrier was complete without this worker, or the time is over; this worker is then no longer counted.
        Raises StoreError.
        """
        self._token = secrets.token_hex(8)
        self._wait = _Wait()
        deadline = math.inf
        if self._timeout_s is not None:
            deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with self._wait.until(deadline):
                return await self._join(registry, deadline)
        except TimeoutError:
            await self.aclose()
            if self._wait.lost is not None:
                raise BarrierError(f"{self._name}: {self._worker_id!r} was taken out of it") from None
            raise BarrierError(f"{self._name} was not complete within {self._timeout_s} s") from None
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Leave the barrier."""
        registration, self._registration = self._registration, None
        if registration is not None:
            await withdraw([registration])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _join(self, registry: Registry, deadline: float) -> Any:
        room = _Room(self._prefix)
        async with registry.watch(self._prefix) as watch:
            while room.leader is None:
                room.apply(await anext(watch, None))
            joined = room.leader
            self._raise_if_over(room, joined)
            self._registration = await self._register(registry, joined["round"], deadline)
            while (end := room.ends.get(joined["round"])) is None:
                await self._wait_for_leader(registry, room, watch, joined)
        self._raise_if_aborted(end)
        if end.get("workers", {}).get(self._worker_id) != self._token:
            raise BarrierError(f"{self._name} was complete without {self._worker_id!r}")
        return joined.get("data")

    def _raise_if_over(self, room: _Room, leader: Mapping[str, Any]) -> None:
        end = room.ends.get(leader["round"])
        if end is not None:
            self._raise_if_aborted(end)
            raise BarrierError(f"{self._name} was complete before {self._worker_id!r} came")

    def _raise_if_aborted(self, end: Mapping[str, Any]) -> None:
        if "reason" in end:
            raise BarrierError(f"{self._name} was aborted: {end['reason']}")

    async def _wait_for_leader(
        self, registry: Registry, room: _Room, watch: Watch, joined: Mapping[str, Any]
    ) -> None:
        """Take one step towards the round's end. Raises BarrierError if there will be none."""
        if room.leader is None and not room.history_lost:
            raise BarrierError(f"{self._name}: the leader is gone")
        if room.leader is not None and room.leader["round"] != joined["round"]:
            raise BarrierError(f"{self._name}: the leader is gone, another has begun")
        limit_s = registry.lease_ttl_s + GRACE_S if room.leader is None else None
        try:
            async with asyncio.timeout(limit_s):
                room.apply(await anext(watch, None))
        except TimeoutError:
            raise BarrierError(f"{self._name}: the leader is gone") from None

    async def _register(self, registry: Registry, round_: str, deadline: float) -> Registration:
        key = f"{self._prefix}{_WORKERS}{encode_segment(self._worker_id)}"
        taken = f"{self._name} has a worker {self._worker_id!r} already"
        return await _claim(
            registry, key, _encode(round_, {"token": self._token}), deadline, taken, self._wait.on_lost
        )


class _Room:
    """What a worker has seen of a barrier.

    `leader` is the record of the leader that is there. `ends` are the ends seen, by round: they stay even if
    their record goes at once. `history_lost` is whether the leader went with the registry's data, so that it
    may come back.
    """

    def __init__(self, prefix: str) -> None:
        self.leader: Mapping[str, Any] | None = None
        self.ends: dict[str, Mapping[str, Any]] = {}
        self.history_lost = False
        self._prefix = prefix

    def apply(self, batch: WatchBatch | None) -> None:
        """Take note of changes. Raises BarrierError for None: the watch has ended."""
        if batch is None:
            raise BarrierError("the registry was closed")
        for event in batch.events:
            if isinstance(event, Delete):
                if event.key == self._prefix + _DATA:
                    self.leader, self.history_lost = None, event.cause is DeleteCause.RESYNC
                continue
            name, record = event.record.key.removeprefix(self._prefix), _decode(event.record.value)
            if "round" in record and name == _DATA:
                self.leader = record
            elif "round" in record and name in (_COMPLETE, _ABORT):
                self.ends[record["round"]] = record


class _Wait:
    """A wait with a deadline, which also ends (as TimeoutError) when a key that it rests on is lost."""

    def __init__(self) -> None:
        self.lost: LostReason | None = None
        self._limit: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[None]:
        """Wait inside; `deadline` by the event loop's clock, or infinity."""
        try:
            async with asyncio.timeout_at(None if math.isinf(deadline) else deadline) as self._limit:
                if self.lost is not None:
                    self._limit.reschedule(0)
                yield
        finally:
            self._limit = None

    def on_lost(self, reason: LostReason) -> None:
        """A key is no longer ours."""
        self.lost = reason
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(0)


async def _claim(
    registry: Registry,
    key: str,
    value: bytes,
    deadline: float,
    taken: str,
    on_lost: Callable[[LostReason], None],
) -> Registration:
    """Register an exclusive key, once nobody else has it and Redis answers.

    A holder that does not go within its lease's time lives. Raises BarrierError(`taken`) then, at once if it
    is this process itself, and when the next try would be past `deadline`; so does StoreUnavailable.
    """
    now = asyncio.get_running_loop().time
    last_try_at = deadline - _RETRY_S
    patient_until = min(last_try_at, now() + registry.lease_ttl_s + GRACE_S)
    while True:
        try:
            return await registry.register(key, value, exclusive=True, on_lost=on_lost)
        except KeyExists:
            if now() >= patient_until or await _is_held_here(registry, key):
                raise BarrierError(taken) from None
        except StoreUnavailable as exc:
            if now() >= last_try_at:
                raise
            log.warning("waiting for Redis, to write %s: %s", key, exc)
        await asyncio.sleep(_RETRY_S)


async def _is_held_here(registry: Registry, key: str) -> bool:
    record = await registry.get(key)
    return record is not None and record.lease == registry.lease_id


def _encode(round_: str, fields: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": _VERSION, "round": round_, **fields}).encode()


def _decode(value: bytes) -> dict[str, Any]:
    """A record; empty if it is none that this release reads."""
    try:
        record = json.loads(value)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and record.get("version") == _VERSION else {}
