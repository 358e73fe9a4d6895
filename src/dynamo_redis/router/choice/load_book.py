"""The load book: the load of each worker, by the requests booked on it. Pure.

A block of a worker counts once, however many of its requests hold it (`active_blocks.py`). Blocks without a
name, which no other request can share, count on top. A worker's own report corrects the count until its next
report.

A booking belongs to the router that made it (its *owner*) and has a deadline. It ends by `free`, with its
deadline, with its owner, or with its worker's instance, whichever comes first. So a lost `free` only makes a
load end late.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dynamo_redis.router.base import Worker, WorkerLoad
from dynamo_redis.router.choice.active_blocks import NAME_BYTES, ActiveBlocks

IDLE = WorkerLoad(0, 0, 0)

_REMEMBERED_S = 60.0
_REMEMBERED_COUNT = 8192
_SLACK_COUNT = 256


@dataclass(slots=True)
class _BookedLoad:
    """The load of one request on its worker."""

    worker: Worker
    prefill_tokens: int
    unnamed_count: int
    names: bytes
    unread_blocks: int
    """Blocks that the worker has to fill first; 0 once the prompt is read."""
    deadline: float


@dataclass(slots=True)
class _Sums:
    """The sums of a worker's bookings. `correction` are the blocks that its report added, or took off."""

    prefill_tokens: int = 0
    blocks: int = 0
    unread_blocks: int = 0
    request_count: int = 0
    correction: int = 0


_Key = tuple[str, str]


class LoadBook:
    """Bookings by (owner, request id), and each worker's sums. Deadlines are of the caller's clock.

    Adding and freeing are O(log n). The heap of deadlines holds at most twice the live bookings, and
    `_SLACK_COUNT` more.
    """

    def __init__(self) -> None:
        self._bookings: dict[str, dict[str, _BookedLoad]] = {}
        self._blocks = ActiveBlocks()
        self._sums: dict[Worker, _Sums] = {}
        self._loads: dict[Worker, WorkerLoad] = {}
        self._deadlines: list[tuple[float, str, str]] = []
        self._count = 0
        self._ended = _EndedRequests()

    @property
    def booking_count(self) -> int:
        """Number of live bookings."""
        return self._count

    def add(
        self,
        owner: str,
        request_id: str,
        worker: Worker,
        *,
        prefill_tokens: int,
        blocks: int,
        deadline: float,
        names: bytes = b"",
    ) -> None:
        """Book a request, in place of a booking of the same owner and id. No effect if its `free` came first.

        Args:
            owner: the name of the router.
            request_id: the request's id, unique for that owner.
            worker: the worker that the request goes to.
            prefill_tokens: prompt tokens that the worker has to read; 0 if it has read them.
            blocks: all blocks of the prompt.
            deadline: the time at which the booking ends by itself.
            names: the packed names of the first of these blocks (`block_hashes.pack_names`).
        """
        if self._ended.pop_early((owner, request_id)):
            return
        self._end(owner, request_id)
        unnamed_count = max(blocks - len(names) // NAME_BYTES, 0)
        new_blocks = self._blocks.hold(worker, names) + unnamed_count
        unread_blocks = new_blocks if prefill_tokens else 0
        self._bookings.setdefault(owner, {})[request_id] = _BookedLoad(
            worker, prefill_tokens, unnamed_count, names, unread_blocks, deadline
        )
        self._count += 1
        sums = self._sums.setdefault(worker, _Sums())
        sums.prefill_tokens += prefill_tokens
        sums.blocks += new_blocks
        sums.unread_blocks += unread_blocks
        sums.request_count += 1
        self._show(worker, sums)
        heapq.heappush(self._deadlines, (deadline, owner, request_id))
        if len(self._deadlines) > 2 * self._count + _SLACK_COUNT:
            self._deadlines = [
                (booking.deadline, owner, request_id)
                for owner, bookings in self._bookings.items()
                for request_id, booking in bookings.items()
            ]
            heapq.heapify(self._deadlines)

    def prefill_done(self, owner: str, request_id: str) -> None:
        """Note that the worker has read the prompt. Idempotent; no effect on a request that is not booked."""
        booking = self._bookings.get(owner, {}).get(request_id)
        if booking is not None and booking.prefill_tokens:
            sums = self._sums[booking.worker]
            sums.prefill_tokens -= booking.prefill_tokens
            sums.unread_blocks -= booking.unread_blocks
            booking.prefill_tokens = booking.unread_blocks = 0
            self._show(booking.worker, sums)

    def free(self, owner: str, request_id: str) -> None:
        """End a booking: the request is over. Idempotent; a `free` that comes before its `add` is remembered
        for a while."""
        is_early = not self._end(owner, request_id)
        self._ended.note((owner, request_id), early=is_early)

    def owners(self) -> list[str]:
        """Return the routers that have live bookings."""
        return list(self._bookings)

    def drop_owner(self, owner: str) -> None:
        """End all bookings of a router that is gone."""
        for request_id in list(self._bookings.get(owner, ())):
            self._end(owner, request_id)

    def drop_instance(self, instance_id: int) -> None:
        """End all bookings of an instance that is gone, with all its ranks. Looks at every booking."""
        self._drop(
            (owner, request_id)
            for owner, bookings in self._bookings.items()
            for request_id, booking in bookings.items()
            if booking.worker.instance_id == instance_id
        )
        for worker in [worker for worker in self._sums if worker.instance_id == instance_id]:
            self.forget_report(worker)

    def expire(self, now: float) -> int:
        """End the bookings whose deadline has come; return their number."""
        late: list[_Key] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, owner, request_id = heapq.heappop(self._deadlines)
            booking = self._bookings.get(owner, {}).get(request_id)
            if booking is not None and booking.deadline == deadline:
                late.append((owner, request_id))
        count = self._drop(late)
        self._ended.expire(now)
        return count

    # ----------------------------------------------------------------- reports of the workers

    def report(self, worker: Worker, active_blocks: int) -> None:
        """Correct a worker's blocks by the number that it says its requests hold now.

        The worker's number is exact, but bookings also have prompts that it has yet to read, or is reading:
        it may hold any part of their blocks. So its number counts if it is above all booked blocks, or below
        the booked blocks of prompts that are read. Later bookings and frees count on top.
        """
        sums = self._sums.setdefault(worker, _Sums())
        explained = min(max(active_blocks, sums.blocks - sums.unread_blocks), sums.blocks)
        sums.correction = active_blocks - explained
        self._show(worker, sums)

    def forget_report(self, worker: Worker) -> None:
        """Drop a worker's report, which is too old: its bookings alone count."""
        sums = self._sums.get(worker)
        if sums is not None:
            sums.correction = 0
            self._show(worker, sums)

    # ----------------------------------------------------------------- loads

    def load(self, worker: Worker) -> WorkerLoad:
        """Return the load of a worker."""
        return self._loads.get(worker, IDLE)

    def loads(self) -> Mapping[Worker, WorkerLoad]:
        """Return the load of each worker that has any. The mapping is the book's own: do not change it."""
        return self._loads

    def active(self, names: bytes) -> Mapping[Worker, int]:
        """Return the number of blocks of a prompt that the requests of each worker hold already, without
        workers that hold none."""
        return self._blocks.active(names)

    # ----------------------------------------------------------------- inner steps

    def _drop(self, keys: Iterable[_Key]) -> int:
        """End these bookings; return their number."""
        ended = 0
        for owner, request_id in list(keys):
            if self._end(owner, request_id):
                ended += 1
                self._ended.note((owner, request_id), early=False)
        return ended

    def _end(self, owner: str, request_id: str) -> bool:
        """Take a booking out of the book and its worker's sums; return False if there is none."""
        bookings = self._bookings.get(owner)
        booking = bookings.pop(request_id, None) if bookings is not None else None
        if bookings is None or booking is None:
            return False
        if not bookings:
            del self._bookings[owner]
        self._count -= 1
        worker = booking.worker
        sums = self._sums[worker]
        sums.prefill_tokens -= booking.prefill_tokens
        sums.blocks -= self._blocks.release(worker, booking.names) + booking.unnamed_count
        sums.unread_blocks -= booking.unread_blocks
        sums.request_count -= 1
        self._show(worker, sums)
        return True

    def _show(self, worker: Worker, sums: _Sums) -> None:
        """Update a worker's load from its sums; drop both if there is no load."""
        blocks = max(sums.blocks + sums.correction, 0)
        if sums.request_count or blocks:
            self._loads[worker] = WorkerLoad(sums.prefill_tokens, blocks, sums.request_count)
        else:
            self._loads.pop(worker, None)
            del self._sums[worker]


class _EndedRequests:
    """Requests that are over, remembered for a while: an `add` after its `free` must book nothing, and a
    second `free` must not be taken for one that came early."""

    def __init__(self) -> None:
        self._young: dict[_Key, bool] = {}
        self._old: dict[_Key, bool] = {}
        self._turned = float("-inf")

    def note(self, key: _Key, *, early: bool) -> None:
        """Remember a request. `early`: its `free` came before its `add`."""
        if early and (key in self._young or key in self._old):
            return
        self._young[key] = early
        if len(self._young) >= _REMEMBERED_COUNT:
            self._turn()

    def pop_early(self, key: _Key) -> bool:
        """Forget a request; return whether its `free` came early."""
        early = self._young.pop(key, None)
        older = self._old.pop(key, None)
        return bool(older if early is None else early)

    def expire(self, now: float) -> None:
        """Forget requests between one and two `_REMEMBERED_S` after they were noted."""
        if now - self._turned >= _REMEMBERED_S:
            self._turn()
            self._turned = now

    def _turn(self) -> None:
        self._old = self._young
        self._young = {}
