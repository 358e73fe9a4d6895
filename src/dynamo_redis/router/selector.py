"""What a choice costs, and which worker is chosen. Pure. The cost, in blocks:

    prefill_blocks = (prompt tokens the worker has to read already + tokens of this prompt) / block_size
    credit         = overlap_score_credit · device + host_credit · host + disk_credit · disk
    decode_blocks  = blocks the worker's requests hold + blocks of this prompt
    cost           = prefill_load_scale · max(prefill_blocks − credit, 0) + decode_blocks

where device, host and disk are the blocks of the prompt that the worker holds there. The lowest cost wins;
among equals the lower load, then chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from dynamo_redis.router.base import Choice, CostWeights, Matched, Worker, WorkerCost
from dynamo_redis.router.load import IDLE, LoadBook

NOTHING = Matched(0)


class Selector:
    """Chooses the worker of least cost; with a temperature, draws by softmax.

    Chance comes from `rng` alone: equal seeds and equal questions have equal answers.
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
        explain: bool = False,
    ) -> Choice:
        """The choice among `candidates`, for a prompt of `token_count` tokens of which they hold `matched`.

        With `explain` it has the costs of all, in the order of `candidates`. Raises ValueError if there are
        none. O(candidates).
        """
        if not candidates:
            raise ValueError("no worker to choose from")
        costs = _costs(candidates, matched, book, token_count, block_size, weights)
        if weights.temperature > 0:
            worker = self._draw(candidates, costs, weights.temperature)
        else:
            worker = self._least(candidates, costs, book)
        explained = _explain(candidates, matched, book, costs, token_count, block_size) if explain else ()
        return Choice(worker, matched.get(worker, NOTHING), costs[candidates.index(worker)], explained)

    def _least(self, candidates: Sequence[Worker], costs: Sequence[float], book: LoadBook) -> Worker:
        lowest = min(costs)
        if costs.count(lowest) == 1:
            return candidates[costs.index(lowest)]
        equals = [worker for worker, cost in zip(candidates, costs, strict=True) if cost == lowest]
        loads = [book.pending_blocks(worker) for worker in equals]
        least = min(loads)
        return self._rng.choice([worker for worker, load in zip(equals, loads, strict=True) if load == least])

    def _draw(self, candidates: Sequence[Worker], costs: Sequence[float], temperature: float) -> Worker:
        lowest = min(costs)
        scale = (max(costs) - lowest) * temperature
        if scale == 0:
            return self._rng.choice(candidates)
        chances = [math.exp((lowest - cost) / scale) for cost in costs]
        return self._rng.choices(candidates, chances)[0]


def _costs(
    candidates: Sequence[Worker],
    matched: Mapping[Worker, Matched],
    book: LoadBook,
    token_count: int,
    block_size: int,
    weights: CostWeights,
) -> list[float]:
    loads = book.loads()
    own_blocks = -(-token_count // block_size)
    scale = weights.prefill_load_scale
    costs = []
    for worker in candidates:
        prefill_tokens, blocks, _ = loads.get(worker, IDLE)
        prefill_blocks = (prefill_tokens + token_count) / block_size
        if (held := matched.get(worker)) is not None:
            prefill_blocks = max(prefill_blocks - _credit(held, weights), 0.0)
        costs.append(scale * prefill_blocks + (blocks + own_blocks))
    return costs


def _credit(held: Matched, weights: CostWeights) -> float:
    device, host, disk = held
    return weights.overlap_score_credit * device + weights.host_credit * host + weights.disk_credit * disk


def _explain(
    candidates: Sequence[Worker],
    matched: Mapping[Worker, Matched],
    book: LoadBook,
    costs: Sequence[float],
    token_count: int,
    block_size: int,
) -> tuple[WorkerCost, ...]:
    own_blocks = -(-token_count // block_size)
    explained = []
    for worker, cost in zip(candidates, costs, strict=True):
        load = book.load(worker)
        prefill_blocks = (load.prefill_tokens + token_count) / block_size
        held = matched.get(worker, NOTHING)
        explained.append(WorkerCost(worker, cost, held, prefill_blocks, load.blocks + own_blocks))
    return tuple(explained)
