"""The router's words: workers, what they hold of a prompt, what they have to do, and a choice. Pure.

`Chooser` is the seam between knowing and deciding: it chooses a worker and books the request's load in one
step. `choice/booking.py` does it on the process's own load book, told to the others by messages; a chooser
that books in a script in Redis has the same shape, which is why `choose` is awaited.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Worker(NamedTuple):
    """What requests go to and load is kept of: one data-parallel rank of one instance."""

    instance_id: int
    dp_rank: int = 0


class Matched(NamedTuple):
    """Blocks at the beginning of a prompt that a worker holds: on its device, and following those, on its
    host and on its disk."""

    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class CostWeights:
    """How a choice weighs; names as in Dynamo. A request may bring its own."""

    overlap_score_credit: float = 1.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    prefill_load_scale: float = 1.0
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """One request, as far as choosing goes.

    `hashes` are the sequence hashes of the prompt's whole blocks, `token_count` all its tokens.
    `deadline` is monotonic: the booking ends with it. `among` and `excluded` are instance ids.
    """

    request_id: str
    hashes: Sequence[int]
    token_count: int
    deadline: float
    among: Collection[int] | None = None
    excluded: Collection[int] = ()
    weights: CostWeights | None = None


class WorkerCost(NamedTuple):
    """Why a worker was, or was not, chosen; in blocks."""

    worker: Worker
    cost: float
    matched: Matched
    prefill_blocks: float
    decode_blocks: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The worker chosen, and what it holds of the prompt. `costs` are those of all, if asked for."""

    worker: Worker
    matched: Matched
    cost: float
    costs: tuple[WorkerCost, ...] = field(default=(), repr=False)


class WorkerLoad(NamedTuple):
    """What a worker has to do, by the bookings known here."""

    prefill_tokens: int
    """Prompt tokens that it still has to read, without those it had in its cache."""
    blocks: int
    """Blocks that its running requests hold."""
    request_count: int


class Chooser(Protocol):
    """Chooses workers and keeps the book of their load. Not for other event loops or threads.

    A booking ends by `free`, with its deadline, or with the router that made it.
    """

    async def choose(self, request: RoutingRequest) -> Choice:
        """Choose and book. Raises NoInstances if there is nobody, Overloaded if all are busy and no more may
        wait. A request id that is booked already gets its choice again, unless that worker is excluded now:
        then it is booked anew."""
        ...

    def prefill_done(self, request_id: str) -> None:
        """The first item has come: the prompt is read. No effect on one that is not booked."""
        ...

    def free(self, request_id: str) -> None:
        """The request is over. Idempotent."""
        ...

    def loads(self) -> Mapping[Worker, WorkerLoad]:
        """What the workers have to do now."""
        ...
