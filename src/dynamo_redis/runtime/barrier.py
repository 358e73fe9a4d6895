"""A leader/worker barrier: one leader publishes data, and all proceed together once every worker has it.

The keys under `v1/barrier/<id>/` hold JSON records. Each key is exclusive, each record has the barrier's
`round`:

    data              by the leader: `data`
    workers/<id>      by each worker: its `token`
    complete          by the leader, at the end: the `workers` that were counted, id → token
    abort             by the leader instead of `complete`, if it gives up: the `reason`

The round is a random id that the leader makes. It separates successive barriers of one id: a worker of an
earlier round is not counted, and the `complete` or `abort` of an earlier leader is ignored. The token is
random, too. It separates workers of one id: a worker that reuses the id of a counted worker was not counted
itself. All keys end with their owner's lease. While Redis does not answer, leader and workers wait until
their time-outs.
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

from dynamo_redis.decoding import check_version, read_json_object
from dynamo_redis.errors import (
    BarrierError,
    InvalidRecord,
    KeyExists,
    SchemaMismatch,
    StoreError,
    StoreUnavailable,
)
from dynamo_redis.names import barrier_prefix, decode_segment, encode_segment
from dynamo_redis.runtime.following import key_of
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import (
    Delete,
    DeleteCause,
    LostReason,
    Put,
    Registration,
    Registry,
    WatchBatch,
)

log = logging.getLogger(__name__)

_DATA, _WORKERS, _COMPLETE, _ABORT = "data", "workers/", "complete", "abort"
_VERSION: Final = 1
_WHAT: Final = "a record of a barrier"
_RETRY_S: Final = 0.2
_LOST_LEADER: Final[Mapping[LostReason, str]] = {
    "conflict": "another leader has taken its place",
    "deleted": "its key was deleted",
}
GRACE_S: Final = 2.0
"""Seconds beyond the lease's TTL to wait for a key of a process that died, or after the registry lost
data."""


class LeaderBarrier:
    """The leader's side of a barrier.

    The barrier's keys stay until `aclose` (or the end of `async with`), or until the leader's lease ends.
    Workers that join after its end, while the keys are there, learn the outcome.
    """

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
        """Publish `data` (JSON), wait for all workers, release them; return their ids, sorted.

        The ids are those of the first `worker_count` workers that joined. A worker that dies or gives up at
        that moment may be among them. If an earlier leader of the same id died, this waits until its lease
        ends.

        Raises BarrierError if another live leader has that id, if another took the id after Redis lost its
        data, or if not all workers joined in time; the waiting workers get the reason. Raises StoreError;
        after StoreUnavailable some workers may have been released.
        """
        self._round = secrets.token_hex(8)
        self._wait = _Wait()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        await self._publish(registry, _DATA, {"data": data}, deadline)
        try:
            workers = await self._wait_for_workers(registry, deadline)
            await self._publish(registry, _COMPLETE, {"workers": workers}, deadline)
        except BaseException as exc:
            # Tell the workers the reason. If that fails, remove the barrier, which ends their waits, too.
            reason = str(exc) if isinstance(exc, BarrierError) else "the leader stopped waiting"
            aborted = _encode(self._round, {"reason": reason})
            try:
                registration = await registry.register(self._prefix + _ABORT, aborted, exclusive=True)
            except StoreError as failure:
                log.warning("%s: could not be aborted in the registry, removing it: %s", self._name, failure)
                await self.aclose()
            else:
                self._registrations.append(registration)
            raise
        return sorted(workers)

    async def aclose(self) -> None:
        """Remove the barrier. Workers that join later wait for a new leader of that id."""
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

    async def _wait_for_workers(self, registry: Registry, deadline: float) -> dict[str, str]:
        """Wait for `worker_count` workers; return the first ones, id → token, in the order of their
        arrival."""
        present: dict[str, str] = {}
        prefix = self._prefix + _WORKERS
        try:
            async with self._wait.until(deadline), registry.watch(prefix) as watch:
                async for batch in watch:
                    for event in batch.events:
                        worker_id = decode_segment(key_of(event).removeprefix(prefix))
                        record = _decode(event.record.value) if isinstance(event, Put) else {}
                        if record.get("round") == self._round:
                            present[worker_id] = record.get("token", "")
                        else:
                            present.pop(worker_id, None)
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


class WorkerBarrier:
    """A worker's side of a barrier. `sync` returns the leader's data once all workers have joined."""

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
        """Wait for the leader's data, register this worker, wait for all other workers; return the data.

        Returns only if the leader has counted this worker. If an earlier worker of the same id died, this
        waits until its lease ends. If Redis has lost its data, the leader has the same time to publish its
        data again.

        Raises BarrierError if another live worker has this id, if the leader gave up, vanished or was
        replaced, if the barrier was complete without this worker, or after the time-out; this worker is then
        no longer counted. Raises StoreError.
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
        """Register with the leader's round and wait until that round ends. Raises BarrierError."""
        state = _State(self._prefix)
        own_key = f"{self._prefix}{_WORKERS}{encode_segment(self._worker_id)}"
        taken = f"{self._name} has a worker {self._worker_id!r} already"
        async with registry.watch(self._prefix) as watch:
            while (joined := state.leader) is None:
                state.apply(await anext(watch, None))
            end = state.ends.get(joined["round"])
            if end is not None:
                self._raise_if_aborted(end)
                raise BarrierError(f"{self._name} was complete before {self._worker_id!r} came")
            value = _encode(joined["round"], {"token": self._token})
            self._registration = await _claim(registry, own_key, value, deadline, taken, self._wait.on_lost)
            while (end := state.ends.get(joined["round"])) is None:
                if state.leader is None and not state.history_lost:
                    raise BarrierError(f"{self._name}: the leader is gone")
                if state.leader is not None and state.leader["round"] != joined["round"]:
                    raise BarrierError(f"{self._name}: the leader is gone, another has begun")
                limit_s = registry.lease_ttl_s + GRACE_S if state.leader is None else None
                try:
                    async with asyncio.timeout(limit_s):
                        state.apply(await anext(watch, None))
                except TimeoutError:
                    raise BarrierError(f"{self._name}: the leader is gone") from None
        self._raise_if_aborted(end)
        if end.get("workers", {}).get(self._worker_id) != self._token:
            raise BarrierError(f"{self._name} was complete without {self._worker_id!r}")
        return joined.get("data")

    def _raise_if_aborted(self, end: Mapping[str, Any]) -> None:
        if "reason" in end:
            raise BarrierError(f"{self._name} was aborted: {end['reason']}")


class _State:
    """The state of a barrier, as a worker's watch shows it.

    `leader` is the present leader's record, or None. `ends` has the `complete` or `abort` record of each
    round; an entry stays when its key is deleted. `history_lost` is True if the leader's key went with the
    registry's data: the leader may then register again.
    """

    def __init__(self, prefix: str) -> None:
        self.leader: Mapping[str, Any] | None = None
        self.ends: dict[str, Mapping[str, Any]] = {}
        self.history_lost = False
        self._prefix = prefix

    def apply(self, batch: WatchBatch | None) -> None:
        """Apply the changes of a batch.

        Raises BarrierError for None, which means that the watch has ended.
        """
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
    """A wait with a deadline. It also ends, with TimeoutError, when a key of this process is lost."""

    def __init__(self) -> None:
        self.lost: LostReason | None = None
        self._limit: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[None]:
        """Limit the time of the block; `deadline` is a time of the event loop's clock, or infinity."""
        try:
            async with asyncio.timeout_at(None if math.isinf(deadline) else deadline) as self._limit:
                if self.lost is not None:
                    self._limit.reschedule(0)
                yield
        finally:
            self._limit = None

    def on_lost(self, reason: LostReason) -> None:
        """Note that a key is no longer registered by this process, and end the wait."""
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
    """Register an exclusive key as soon as no other process holds it and Redis answers.

    A holder whose key is still there after a lease's TTL is taken to be alive. Raises BarrierError(`taken`)
    then, at once if the holder is this process itself, or when the next try would be past `deadline`. Raises
    StoreUnavailable if Redis does not answer until the last try before `deadline`.

    Args:
        key: the whole key.
        value: the record to store.
        deadline: a time of the event loop's clock, or infinity.
        taken: the message of the BarrierError.
        on_lost: called if the key is lost after it was registered.
    """
    now = asyncio.get_running_loop().time
    last_try_at = deadline - _RETRY_S
    holder_lives_at = min(last_try_at, now() + registry.lease_ttl_s + GRACE_S)
    while True:
        try:
            return await registry.register(key, value, exclusive=True, on_lost=on_lost)
        except KeyExists:
            if now() >= holder_lives_at:
                raise BarrierError(taken) from None
            held = await registry.get(key)
            if held is not None and held.lease == registry.lease_id:
                raise BarrierError(taken) from None
        except StoreUnavailable as exc:
            if now() >= last_try_at:
                raise
            log.warning("waiting for Redis, to write %s: %s", key, exc)
        await asyncio.sleep(_RETRY_S)


def _encode(round_: str, fields: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": _VERSION, "round": round_, **fields}).encode()


def _decode(value: bytes) -> dict[str, Any]:
    """Return the record's fields; empty if it is no record of a barrier.

    Raises BarrierError for a record of another version: waiting for its process would end at the time-out."""
    try:
        record = read_json_object(value, _WHAT)
        check_version(record.get("version"), _VERSION, _WHAT)
    except SchemaMismatch as exc:
        raise BarrierError(f"{exc}, so that leader and workers are of one release") from exc
    except InvalidRecord:
        return {}
    return record
