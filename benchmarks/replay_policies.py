"""Policies for the simulation: the omniscient router, and those that users have."""

from __future__ import annotations

import random
from typing import Final

from benchmarks.replay_model import ModelSequence, Simulation
from benchmarks.replay_trace import TRACE_BLOCK_SIZE, TracedRequest
from dynamo_redis.router.base import CostWeights
from dynamo_redis.runtime.selection import policy

_WEIGHTS: Final = CostWeights()


class Omniscient:
    """One router that sees all caches and queues as they are, and weighs them by the literal cost:

    prefill_load_scale × max((queued prompt tokens + prompt) / block_size − credit × held, 0) + blocks in use
    """

    def __init__(self, simulation: Simulation, rng: random.Random, weights: CostWeights = _WEIGHTS) -> None:
        self._engines = simulation.engines
        self._rng = rng
        self._weights = weights

    def choose(self, index: int, request: TracedRequest, replica: int) -> tuple[int, int]:
        whole = request.block_ids[: request.prompt_count // TRACE_BLOCK_SIZE]
        held = [engine.cache.match(whole, len(whole)) for engine in self._engines]
        costs = [
            self._weights.prefill_load_scale
            * max(
                (engine.prefill_token_count() + request.prompt_count) / TRACE_BLOCK_SIZE
                - self._weights.overlap_score_credit * blocks,
                0.0,
            )
            + engine.block_count()
            for engine, blocks in zip(self._engines, held, strict=True)
        ]
        least = min(costs)
        worker = self._rng.choice([number for number, cost in enumerate(costs) if cost == least])
        return worker, held[worker]

    def first_token(self, sequence: ModelSequence) -> None:
        pass

    def finished(self, sequence: ModelSequence) -> None:
        pass


class _Seen:
    """A worker as one replica's client sees it."""

    def __init__(self, number: int) -> None:
        self.instance_id = number
        self.in_flight = 0


class Blind:
    """The client's own policies (`round_robin`, `p2c`, …), each replica with its own counts."""

    def __init__(self, simulation: Simulation, mode: str, replicas: int, rng: random.Random) -> None:
        workers = range(len(simulation.engines))
        self._seen = [[_Seen(number) for number in workers] for _ in range(replicas)]
        self._policies = [policy(mode, rng) for _ in range(replicas)]

    def choose(self, index: int, request: TracedRequest, replica: int) -> tuple[int, int]:
        chosen = self._policies[replica](self._seen[replica])
        chosen.in_flight += 1
        return chosen.instance_id, 0

    def first_token(self, sequence: ModelSequence) -> None:
        pass

    def finished(self, sequence: ModelSequence) -> None:
        self._seen[sequence.replica][sequence.worker].in_flight -= 1
