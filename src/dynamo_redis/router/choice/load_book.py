"""The load book: what each worker has to do, by the requests booked on it. Pure.

A worker's blocks are counted once, however many of its requests hold them (`active_blocks.py`). A request's
blocks without a name, which are those that no other request can share, count on top. What a worker itself
reports corrects the count until its next report.

A booking belongs to the router that made it (its *owner*) and has a deadline: it ends by `free`, with its
deadline, with its owner, or with its worker's instance, whatever comes first. So a lost `free` is never more
than a load that ends late.
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
class _Booking:
    worker: Worker
    prefill_tokens: int
    unnamed_count: int
    names: bytes
    unread_blocks: int
    """Blocks that the worker has to fill first; 0 once the prompt is read."""
    deadline: float


@dataclass(slots=True)
class _Sums:
    """A worker's bookings together. `correction` is what its report added to the blocks."""

    prefill_tokens: int = 0
    blocks: int = 0
    unread_blocks: int = 0
    request_count: int = 0
    correction: int = 0


_Key = tuple[str, str]


class LoadBook:
    """Bookings by (owner, request id), and each worker's sums. Deadlines are of the caller's one clock.

    Adding and freeing are O(log n), the deadlines' heap holds at most twice the live bookings and a few.
    """

    def __init__(self) -> None:
        self._bookings: dict[str, dict[str, _Booking]] = {}
        self._blocks = ActiveBlocks()
        self._sums: dict[Worker, _Sums] = {}
        self._loads: dict[Worker, WorkerLoad] = {}
        self._deadlines: list[tuple[float, str, str]] = []
        self._count = 0
        self._over = _Over()

    @property
    def booking_count(self) -> int:
        """Live bookings."""
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
        """Book a request, in place of one of the same owner and id. No effect if its `free` came first.

        `blocks` are all blocks of its prompt; the first of them have `names` (`hashing.pack_names`).
        """
        if self._over.take((owner, request_id)):
            return
        self._end(owner, request_id)
        unnamed_count = max(blocks - len(names) // NAME_BYTES, 0)
        new_blocks = self._blocks.hold(worker, names) + unnamed_count
        unread_blocks = new_blocks if prefill_tokens else 0
        self._bookings.setdefault(owner, {})[request_id] = _Booking(
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
        """The worker has read the prompt. Idempotent; no effect on what is not booked."""
        booking = self._bookings.get(owner, {}).get(request_id)
        if booking is not None and booking.prefill_tokens:
            sums = self._sums[booking.worker]
            sums.prefill_tokens -= booking.prefill_tokens
            sums.unread_blocks -= booking.unread_blocks
            booking.prefill_tokens = booking.unread_blocks = 0
            self._show(booking.worker, sums)

    def free(self, owner: str, request_id: str) -> None:
        """The request is over. Idempotent; one that comes before its `add` is remembered for a while."""
        if self._end(owner, request_id):
            self._over.note((owner, request_id), early=False)
        else:
            self._over.note((owner, request_id), early=True)

    def owners(self) -> list[str]:
        """Return the routers that have booked what lives."""
        return list(self._bookings)

    def drop_owner(self, owner: str) -> None:
        """A router is gone, and with it all that it booked."""
        for request_id in list(self._bookings.get(owner, ())):
            self._end(owner, request_id)

    def drop_instance(self, instance_id: int) -> None:
        """An instance is gone, with all its ranks. Looks at every booking."""
        self._drop(
            (owner, request_id)
            for owner, bookings in self._bookings.items()
            for request_id, booking in bookings.items()
            if booking.worker.instance_id == instance_id
        )
        for worker in [worker for worker in self._sums if worker.instance_id == instance_id]:
            self.forget_report(worker)

    def expire(self, now: float) -> int:
        """End the bookings whose deadline has come; how many there were."""
        late: list[_Key] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, owner, request_id = heapq.heappop(self._deadlines)
            booking = self._bookings.get(owner, {}).get(request_id)
            if booking is not None and booking.deadline == deadline:
                late.append((owner, request_id))
        count = self._drop(late)
        self._over.forget(now)
        return count

    # ----------------------------------------------------------------- reports of the workers

    def report(self, worker: Worker, active_blocks: int) -> None:
        """Take in how many blocks a worker says that its requests hold now.

        It knows better than the bookings, except for prompts that it has yet to read, or is reading: of
        their blocks it may hold any part. So its count stands if it is more than what is booked, or less than
        what is booked of prompts that are read. What is booked and freed later counts on top.
        """
        sums = self._sums.setdefault(worker, _Sums())
        explained = min(max(active_blocks, sums.blocks - sums.unread_blocks), sums.blocks)
        sums.correction = active_blocks - explained
        self._show(worker, sums)

    def forget_report(self, worker: Worker) -> None:
        """Let a worker's bookings alone count: what it has said is too old."""
        sums = self._sums.get(worker)
        if sums is not None:
            sums.correction = 0
            self._show(worker, sums)

    # ----------------------------------------------------------------- questions

    def load(self, worker: Worker) -> WorkerLoad:
        """What a worker has to do."""
        return self._loads.get(worker, IDLE)

    def loads(self) -> Mapping[Worker, WorkerLoad]:
        """Return what each worker with load has to do. The mapping is the book's own: not to be changed."""
        return self._loads

    def active(self, names: bytes) -> Mapping[Worker, int]:
        """Return how many blocks of a prompt the requests of each worker hold already; 0 is left out."""
        return self._blocks.active(names)

    # ----------------------------------------------------------------- inner steps

    def _drop(self, keys: Iterable[_Key]) -> int:
        dropped = list(keys)
        ended = 0
        for owner, request_id in dropped:
            if self._end(owner, request_id):
                ended += 1
                self._over.note((owner, request_id), early=False)
        return ended

    def _end(self, owner: str, request_id: str) -> bool:
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
        blocks = max(sums.blocks + sums.correction, 0)
        if sums.request_count or blocks:
            self._loads[worker] = WorkerLoad(sums.prefill_tokens, blocks, sums.request_count)
        else:
            self._loads.pop(worker, None)
            del self._sums[worker]


class _Over:
    """Requests that are over, for a while: so that an `add` that comes after its `free` books nothing, and a
    second `free` is not taken for one that came early."""

    def __init__(self) -> None:
        self._young: dict[_Key, bool] = {}
        self._old: dict[_Key, bool] = {}
        self._turned = float("-inf")

    def note(self, key: _Key, *, early: bool) -> None:
        if early and (key in self._young or key in self._old):
            return
        self._young[key] = early
        if len(self._young) >= _REMEMBERED_COUNT:
            self._turn()

    def take(self, key: _Key) -> bool:
        """Whether this one's free came early. It is forgotten then."""
        early = self._young.pop(key, None)
        older = self._old.pop(key, None)
        return bool(older if early is None else early)

    def forget(self, now: float) -> None:
        """Time passes: what is older than `_REMEMBERED_S` is forgotten before it is twice as old."""
        if now - self._turned >= _REMEMBERED_S:
            self._turn()
            self._turned = now

    def _turn(self) -> None:
        self._old = self._young
        self._young = {}
