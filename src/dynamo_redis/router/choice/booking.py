"""Chooses a worker and books the request's load there, on this process's own book.

A request is booked in the step that chooses, so that two requests of one tick of the event loop see each
other. The booking ends by `free`, with the request's deadline, or when its instance is gone. Nothing here
waits for Redis: other routers get messages (`booking_sync.py`), which are repeated, so that a lost one does
no lasting harm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.errors import NoInstances
from dynamo_redis.events.block_hashes import pack_names
from dynamo_redis.router.base import (
    BusyThresholds,
    CostWeights,
    Matched,
    RoutingRequest,
    Worker,
    WorkerChoice,
    WorkerLoad,
)
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.selector import Selects
from dynamo_redis.router.choice.waiting_line import WaitingLines

Find = Callable[[Sequence[int]], Mapping[Worker, Matched]]
"""Returns the match of each worker that holds a part of a prompt, by the sequence hashes of its blocks."""

Predict = Callable[[Worker, Sequence[int]], None]
"""Notes that a worker will hold a prompt, for a router that follows no KV events."""


class Candidates(Protocol):
    """The workers to choose from."""

    def candidates(self, among: Collection[int] | None, excluded: Collection[int]) -> Sequence[Worker]:
        """Return the workers to choose from; empty if there are none."""
        ...

    def without_busy(
        self, workers: Sequence[Worker], book: LoadBook, busy: BusyThresholds | None
    ) -> Sequence[Worker]:
        """Return those of the workers that are not busy by these thresholds."""
        ...


@dataclass(slots=True)
class Booking:
    """One request of this router that is under way. `prefill_tokens` is 0 once its prompt is read.

    `blocks` counts all blocks of its prompt; the first of them have `names` (`block_hashes.pack_names`).
    """

    request_id: str
    choice: WorkerChoice
    prefill_tokens: int
    blocks: int
    deadline: float
    names: bytes


class BookingListener(Protocol):
    """Receives this router's bookings. It must be quick, and must not raise."""

    def added(self, booking: Booking) -> None: ...
    def prefill_done(self, request_id: str) -> None: ...
    def freed(self, request_id: str) -> None: ...


class BookingChooser:
    """A `Chooser` on the process's own load book. `owner` is this router's name in it."""

    def __init__(
        self,
        owner: str,
        find: Find,
        candidates: Candidates,
        book: LoadBook,
        selector: Selects,
        lines: WaitingLines,
        *,
        block_size: int,
        weights: CostWeights,
        predict: Predict | None = None,
        listener: BookingListener | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`find` looks into the index, `candidates` names the workers, `selector` weighs them, and `lines`
        holds the requests that wait. `weights` are those of requests that bring none."""
        self.bookings: dict[str, Booking] = {}
        """The bookings of this router by request id, oldest first."""
        self._owner = owner
        self._find = find
        self._predict = predict
        self._candidates = candidates
        self._book = book
        self._selector = selector
        self._lines = lines
        self._block_size = block_size
        self._weights = weights
        self._listener = listener
        self._clock = clock

    # ----------------------------------------------------------------- the chooser

    async def choose(self, request: RoutingRequest) -> WorkerChoice:
        """As `Chooser.choose`. While all workers that the request may go to are busy, it waits in their
        line."""

        def choose_if_free() -> WorkerChoice | None:
            workers = self._candidates.without_busy(self._workers_for(request), self._book, request.busy)
            return self._choose_now(request, workers) if workers else None

        booking = self.bookings.get(request.request_id)
        if booking is not None:
            if booking.choice.worker.instance_id not in request.excluded:
                return booking.choice
            self.free(request.request_id)
        if request.excluded:
            # It has waited in line before: a worker's failure does not send it to the end of the line.
            return self._choose_now(request, self._workers_for(request))
        return await self._lines.enter(choose_if_free, request.deadline, request.among)

    def prefill_done(self, request_id: str) -> None:
        """As `Chooser.prefill_done`."""
        booking = self.bookings.get(request_id)
        if booking is None or not booking.prefill_tokens:
            return
        booking.prefill_tokens = 0
        self._book.prefill_done(self._owner, request_id)
        if self._listener is not None:
            self._listener.prefill_done(request_id)
        self._lines.wake()

    def free(self, request_id: str) -> None:
        """As `Chooser.free`."""
        if self.bookings.pop(request_id, None) is None:
            return
        self._book.free(self._owner, request_id)
        if self._listener is not None:
            self._listener.freed(request_id)
        self._lines.wake()

    def use_block_size(self, block_size: int) -> None:
        """Set the number of tokens in a block, from the next choice on."""
        self._block_size = block_size

    def loads(self) -> Mapping[Worker, WorkerLoad]:
        """As `Chooser.loads`."""
        return self._book.loads()

    # ----------------------------------------------------------------- explanations, deadlines

    def explain(self, request: RoutingRequest) -> WorkerChoice:
        """Return the choice that `choose` would make now, with the costs of all workers, and book nothing.

        Busy workers are not left out. Raises NoInstances.
        """
        names = pack_names(request.hashes)
        return self._select(request, self._workers_for(request), names, explain=True)

    def expire(self, now: float) -> None:
        """End the bookings whose deadline has passed."""
        for booking in tuple(self.bookings.values()):
            if booking.deadline <= now:
                self.free(booking.request_id)

    # ----------------------------------------------------------------- inner steps

    def _workers_for(self, request: RoutingRequest) -> Sequence[Worker]:
        """Return the workers that a request may go to. Raises NoInstances if there are none."""
        workers = self._candidates.candidates(request.among, request.excluded)
        if not workers:
            raise NoInstances("no worker is known that may take the request: is one running?")
        return workers

    def _choose_now(self, request: RoutingRequest, workers: Sequence[Worker]) -> WorkerChoice:
        """Choose one of the workers and book the request there."""
        names = pack_names(request.hashes)
        choice = self._select(request, workers, names)
        found = choice.matched.device * self._block_size
        booking = Booking(
            request.request_id,
            choice,
            prefill_tokens=max(request.token_count - found, 0),
            blocks=-(-request.token_count // self._block_size),
            deadline=request.deadline,
            names=names,
        )
        self.bookings[request.request_id] = booking
        self._book.add(
            self._owner,
            request.request_id,
            choice.worker,
            prefill_tokens=booking.prefill_tokens,
            blocks=booking.blocks,
            deadline=booking.deadline,
            names=names,
        )
        if self._predict is not None:
            self._predict(choice.worker, request.hashes)
        if self._listener is not None:
            self._listener.added(booking)
        return choice

    def _select(
        self, request: RoutingRequest, workers: Sequence[Worker], names: bytes, *, explain: bool = False
    ) -> WorkerChoice:
        """Choose one of the workers. `names` are the packed names of the prompt's whole blocks."""
        return self._selector.select(
            workers,
            self._find(request.hashes),
            self._book,
            token_count=request.token_count,
            block_size=self._block_size,
            weights=request.weights or self._weights,
            active=self._book.active(names),
            explain=explain,
        )
