"""The cost of each worker for a request, and the choice by it. Pure. The cost, in blocks:

    prefill_blocks = (prompt tokens the worker has to read already + tokens of this prompt) / block_size
    credit         = overlap_score_credit · device + host_credit · host + disk_credit · disk
    decode_blocks  = blocks the worker's requests hold + blocks of this prompt that none of them holds
    cost           = prefill_load_scale · max(prefill_blocks − credit, 0) + decode_blocks

where device, host and disk are the blocks of the prompt that the worker holds there. A block that several
requests hold counts once, as it does on the worker. The lowest cost wins. Among workers of equal cost one is
drawn at random: the one with less load holds less of the prompt, so neither is better.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Protocol

from dynamo_redis.router.base import CostWeights, Matched, Worker, WorkerChoice, WorkerCost
from dynamo_redis.router.choice.load_book import IDLE, LoadBook
from dynamo_redis.runtime.selection import Policy

NOTHING = Matched(0)

_NONE_ACTIVE: Mapping[Worker, int] = {}


class Selects(Protocol):
    """Chooses a worker for a request."""

    def select(
        self,
        candidates: Sequence[Worker],
        matched: Mapping[Worker, Matched],
        book: LoadBook,
        *,
        token_count: int,
        block_size: int,
        weights: CostWeights,
        active: Mapping[Worker, int] = ...,
        explain: bool = False,
    ) -> WorkerChoice:
        """As `Selector.select`."""
        ...


class PolicySelector:
    """Chooses by a policy of `runtime/selection.py`, in place of the costs. The policy sees each rank, with
    the number of requests that are booked there."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def select(
        self,
        candidates: Sequence[Worker],
        matched: Mapping[Worker, Matched],
        book: LoadBook,
        *,
        token_count: int,
        block_size: int,
        weights: CostWeights,
        active: Mapping[Worker, int] = _NONE_ACTIVE,
        explain: bool = False,
    ) -> WorkerChoice:
        """As `Selector.select`. The choice has no costs."""
        if not candidates:
            raise ValueError("no worker to choose from")
        loads = map(book.loads().get, candidates, repeat(IDLE))
        ranks = [_Rank(worker, load.request_count) for worker, load in zip(candidates, loads, strict=True)]
        return WorkerChoice(self._policy(ranks).worker, NOTHING, 0.0)


class _Rank:
    """A rank as a policy sees it."""

    __slots__ = ("in_flight", "instance_id", "worker")

    def __init__(self, worker: Worker, in_flight: int) -> None:
        self.worker = worker
        self.instance_id = worker.instance_id
        self.in_flight = in_flight


class Selector:
    """Chooses the worker of lowest cost; with a temperature, draws one by softmax.

    All chance comes from `rng`: equal seeds and equal requests give equal choices.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def select(
        self,
        candidates: Sequence[Worker],
        matched: Mapping[Worker, Matched],
        book: LoadBook,
        *,
        token_count: int,
        block_size: int,
        weights: CostWeights,
        active: Mapping[Worker, int] = _NONE_ACTIVE,
        explain: bool = False,
    ) -> WorkerChoice:
        """Choose one of `candidates`. O(candidates). Raises ValueError if there are none.

        Args:
            candidates: the workers to choose from.
            matched: the match of each worker that holds a part of the prompt.
            book: the load of the workers.
            token_count: tokens of the prompt.
            block_size: tokens of a block.
            weights: the weights of the cost.
            active: blocks of the prompt that running requests hold, by worker: `book.active` of it.
            explain: whether the choice has the costs of all candidates, in their order.
        """
        if not candidates:
            raise ValueError("no worker to choose from")
        costs = _costs(candidates, matched, book, active, token_count, block_size, weights)
        place = self._draw(costs, weights.temperature)
        worker = candidates[place]
        explained = (
            _explain(candidates, matched, book, active, costs, token_count, block_size) if explain else ()
        )
        return WorkerChoice(worker, matched.get(worker, NOTHING), costs[place], explained)

    def _draw(self, costs: Sequence[float], temperature: float) -> int:
        """Return the place of the lowest cost, or with a temperature, of a cost drawn by softmax."""
        lowest = min(costs)
        if temperature <= 0:
            if costs.count(lowest) == 1:
                return costs.index(lowest)
            return self._rng.choice([place for place, cost in enumerate(costs) if cost == lowest])
        scale = (max(costs) - lowest) * temperature
        places = range(len(costs))
        if scale == 0:
            return self._rng.choice(places)
        return self._rng.choices(places, [math.exp((lowest - cost) / scale) for cost in costs])[0]


def _costs(
    candidates: Sequence[Worker],
    matched: Mapping[Worker, Matched],
    book: LoadBook,
    active: Mapping[Worker, int],
    token_count: int,
    block_size: int,
    weights: CostWeights,
) -> list[float]:
    """Return the cost of each candidate, in their order; the arguments are those of `Selector.select`."""
    own_blocks = -(-token_count // block_size)
    scale = weights.prefill_load_scale
    costs = []
    known, credit = NOTHING, 0.0  # of the last match: most workers have the same one
    loads = map(book.loads().get, candidates, repeat(IDLE))
    shared = map(active.get, candidates, repeat(0))
    holds = map(matched.get, candidates)
    for (prefill_tokens, blocks, _), shared_blocks, held in zip(loads, shared, holds, strict=True):
        prefill_blocks = (prefill_tokens + token_count) / block_size
        if held is not None:
            if held is not known:
                known, (device, host, disk) = held, held
                credit = (
                    weights.overlap_score_credit * device
                    + weights.host_credit * host
                    + weights.disk_credit * disk
                )
            prefill_blocks = prefill_blocks - credit if prefill_blocks > credit else 0.0
        costs.append(scale * prefill_blocks + (blocks + own_blocks - shared_blocks))
    return costs


def _explain(
    candidates: Sequence[Worker],
    matched: Mapping[Worker, Matched],
    book: LoadBook,
    active: Mapping[Worker, int],
    costs: Sequence[float],
    token_count: int,
    block_size: int,
) -> tuple[WorkerCost, ...]:
    """Return each candidate's cost with its parts, in their order."""
    own_blocks = -(-token_count // block_size)
    explained = []
    for worker, cost in zip(candidates, costs, strict=True):
        load = book.load(worker)
        prefill_blocks = (load.prefill_tokens + token_count) / block_size
        held = matched.get(worker, NOTHING)
        decode_blocks = load.blocks + own_blocks - active.get(worker, 0)
        explained.append(WorkerCost(worker, cost, held, prefill_blocks, decode_blocks))
    return tuple(explained)
