"""What a choice costs, and which worker is chosen. Pure. The cost, in blocks:

    prefill_blocks = (prompt tokens the worker has to read already + tokens of this prompt) / block_size
    credit         = overlap_score_credit · device + host_credit · host + disk_credit · disk
    decode_blocks  = blocks the worker's requests hold + blocks of this prompt that none of them holds
    cost           = prefill_load_scale · max(prefill_blocks − credit, 0) + decode_blocks

where device, host and disk are the blocks of the prompt that the worker holds there. A block that several
requests hold counts once, as it does on the worker. The lowest cost wins, and among equals chance: of two
workers that cost the same, the one with less load holds less of the prompt, so that neither is the better
rule.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import repeat

from dynamo_redis.router.base import Choice, CostWeights, Matched, Worker, WorkerCost
from dynamo_redis.router.choice.load_book import IDLE, LoadBook

NOTHING = Matched(0)

_NONE_ACTIVE: Mapping[Worker, int] = {}


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
        active: Mapping[Worker, int] = _NONE_ACTIVE,
        explain: bool = False,
    ) -> Choice:
        """The choice among `candidates`, for a prompt of `token_count` tokens of which they hold `matched`,
        and `active` blocks in requests that run: `book.active` of the prompt.

        With `explain` it has the costs of all, in the order of `candidates`. Raises ValueError if there are
        none. O(candidates).
        """
        if not candidates:
            raise ValueError("no worker to choose from")
        costs = _costs(candidates, matched, book, active, token_count, block_size, weights)
        place = self._draw(costs, weights.temperature) if weights.temperature > 0 else self._least(costs)
        worker = candidates[place]
        explained = (
            _explain(candidates, matched, book, active, costs, token_count, block_size) if explain else ()
        )
        return Choice(worker, matched.get(worker, NOTHING), costs[place], explained)

    def _least(self, costs: Sequence[float]) -> int:
        lowest = min(costs)
        if costs.count(lowest) == 1:
            return costs.index(lowest)
        return self._rng.choice([place for place, cost in enumerate(costs) if cost == lowest])

    def _draw(self, costs: Sequence[float], temperature: float) -> int:
        lowest = min(costs)
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
    own_blocks = -(-token_count // block_size)
    scale = weights.prefill_load_scale
    costs = []
    known, credit = NOTHING, 0.0  # what most hold is one and the same
    loads = map(book.loads().get, candidates, repeat(IDLE))
    shared = map(active.get, candidates, repeat(0))
    holds = map(matched.get, candidates)
    for (prefill_tokens, blocks, _), shared_blocks, held in zip(loads, shared, holds, strict=True):
        prefill_blocks = (prefill_tokens + token_count) / block_size
        if held is not None:
            if held is not known:
                known, credit = held, _credit(held, weights)
            prefill_blocks = prefill_blocks - credit if prefill_blocks > credit else 0.0
        costs.append(scale * prefill_blocks + (blocks + own_blocks - shared_blocks))
    return costs


def _credit(held: Matched, weights: CostWeights) -> float:
    device, host, disk = held
    return weights.overlap_score_credit * device + weights.host_credit * host + weights.disk_credit * disk


def _explain(
    candidates: Sequence[Worker],
    matched: Mapping[Worker, Matched],
    book: LoadBook,
    active: Mapping[Worker, int],
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
        decode_blocks = load.blocks + own_blocks - active.get(worker, 0)
        explained.append(WorkerCost(worker, cost, held, prefill_blocks, decode_blocks))
    return tuple(explained)
