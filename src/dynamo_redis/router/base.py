"""The values that the router's parts share: workers, matches, loads, requests and choices. Pure.

`Chooser` is the interface to the part that decides: it chooses a worker and books the request's load in one
step. `choice/booking.py` does it on the process's own load book, and other routers hear of it by messages. A
chooser that books by a script in Redis would have the same interface, which is why `choose` is awaited.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Worker(NamedTuple):
    """One data-parallel rank of one instance. Requests are routed, and load is counted, by rank."""

    instance_id: int
    dp_rank: int = 0


class Matched(NamedTuple):
    """The number of blocks at a prompt's beginning that a worker holds: the first ones on its device, those
    after them on its host, and those after these on its disk."""

    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class CostWeights:
    """The weights of a choice's cost; names as in Dynamo. A request may bring its own."""

    overlap_score_credit: float = 1.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    prefill_load_scale: float = 1.0
    temperature: float = 0.0


@dataclass(slots=True)
class BusyThresholds:
    """The loads above which a worker is busy; None: it is not busy by that load. Names as in Dynamo.

    Its owner may change them: a request keeps a reference to the object, so one that waits for a worker is
    measured by the values of that moment.
    """

    active_decode_blocks_threshold: float | None = None
    """The fraction of its KV blocks that a worker's requests hold."""
    active_prefill_tokens_threshold: int | None = None
    """The prompt tokens that a worker has to read."""
    active_prefill_tokens_threshold_frac: float | None = None
    """The same, in multiples of the tokens that it reads in one step."""

    @property
    def is_set(self) -> bool:
        """True if a worker can be busy."""
        return (
            self.active_decode_blocks_threshold is not None
            or self.active_prefill_tokens_threshold is not None
            or self.active_prefill_tokens_threshold_frac is not None
        )


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """The parts of a request that a choice depends on.

    `hashes` are the sequence hashes of the prompt's whole blocks; `token_count` counts all its tokens.
    `deadline` is monotonic, and ends the booking. `among` and `excluded` are instance ids. `busy` says which
    workers are busy; None: none is.
    """

    request_id: str
    hashes: Sequence[int]
    token_count: int
    deadline: float
    among: Collection[int] | None = None
    excluded: Collection[int] = ()
    weights: CostWeights | None = None
    busy: BusyThresholds | None = None


class WorkerCost(NamedTuple):
    """The cost of one worker and its parts, in blocks."""

    worker: Worker
    cost: float
    matched: Matched
    prefill_blocks: float
    decode_blocks: float


@dataclass(frozen=True, slots=True)
class WorkerChoice:
    """The worker chosen, its match and its cost. `costs` has all workers, if an explanation was wanted."""

    worker: Worker
    matched: Matched
    cost: float
    costs: tuple[WorkerCost, ...] = field(default=(), repr=False)


class WorkerLoad(NamedTuple):
    """The load of a worker, by the bookings known here."""

    prefill_tokens: int
    """Prompt tokens that it has yet to read. Tokens that were in its cache do not count."""
    blocks: int
    """Blocks that its running requests hold."""
    request_count: int


class Chooser(Protocol):
    """Chooses workers, and keeps the book of their load. For one event loop.

    A booking ends by `free`, with its deadline, or with the router that made it.
    """

    async def choose(self, request: RoutingRequest) -> WorkerChoice:
        """Choose a worker and book the request there.

        A request that is booked already gets the same choice again. If that worker is excluded now, the
        request is booked anew. Raises NoInstances if there is no worker, Overloaded if all are busy for
        longer than it may wait, or no more requests may wait.
        """
        ...

    def prefill_done(self, request_id: str) -> None:
        """Note that the first item has come: the prompt is read. No effect on a request that is not
        booked."""
        ...

    def free(self, request_id: str) -> None:
        """End a booking: the request is over. Idempotent."""
        ...

    def loads(self) -> Mapping[Worker, WorkerLoad]:
        """Return the present load of each worker that has any."""
        ...
