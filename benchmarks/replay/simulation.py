"""Runs in simulated time: by the omniscient router, by KV-aware ones, and by policies that do not use the
cache."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from benchmarks.replay.figures import Outcome
from benchmarks.replay.model import ModelSequence, Policy, Simulation
from benchmarks.replay.plan import Chance, Plan
from benchmarks.replay.trace import TRACE_BLOCK_SIZE, TracedRequest
from dynamo_redis.config import RouterSettings
from dynamo_redis.engines.base import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_redis.events.block_hashes import pack_names
from dynamo_redis.router.base import CostWeights, Worker
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.selector import Selector
from dynamo_redis.router.index.predicted_index import PredictedIndex
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.runtime import selection
from dynamo_redis.wire import kv_event

_WEIGHTS: Final = CostWeights()


def simulate(
    plan: Plan,
    make: Callable[[Simulation, Chance], Policy] | None = None,
    *,
    seed: int = 0,
    late_s: float = 0.0,
    counts_once: bool = True,
) -> list[Outcome]:
    """Return the outcomes of the plan's requests in the trace's own time, whatever its speedup.

    `make` makes the policy; by default it is that of the plan's mode, in which messages between processes are
    `late_s` late. `seed` is that of chance among equals. Without `counts_once` a KV-aware router counts a
    block for each request that holds it, as earlier releases did.
    """
    simulation = Simulation(plan.workers, replace(plan, speedup=1.0).engine)
    chance = Chance(seed)
    policy = (
        make(simulation, chance)
        if make is not None
        else _policy(plan, simulation, chance, late_s, counts_once=counts_once)
    )
    return simulation.run(plan.load_trace().requests, policy, replicas=plan.replicas)


def _policy(
    plan: Plan, simulation: Simulation, chance: Chance, late_s: float, *, counts_once: bool
) -> Policy:
    """Return the policy of the plan's mode; for the other parameters see `simulate`."""
    if plan.client_mode is not None:
        return Blind(simulation, plan.client_mode, plan.replicas, chance)
    return KvAware(
        simulation,
        chance,
        replicas=plan.replicas,
        events_s=late_s,
        messages_s=late_s,
        predict=plan.mode == "predicted",
        counts_once=counts_once,
    )


class Omniscient:
    """One router that sees every cache as it is and knows of every request at once. It weighs as the product
    does, by the literal cost, written here again:

        prefill_load_scale · max((queued prompt tokens + prompt) / block_size − credit · held, 0) + blocks

    Queued are, until its first token, the prompt tokens of a request that its worker did not hold at the
    choice. `blocks` are those of the prompts that run there and of this one, each counted once. With `queues`
    the engines' true queues count instead: prompt tokens that are still to be read now, and all blocks in
    use.
    """

    def __init__(
        self,
        simulation: Simulation,
        chance: Chance,
        *,
        weights: CostWeights = _WEIGHTS,
        queues: bool = False,
    ) -> None:
        self._engines = simulation.engines
        self._chance = chance
        self._weights = weights
        self._queues = queues
        self._queued = [0] * len(self._engines)
        self._running: list[Counter[int]] = [Counter() for _ in self._engines]
        """The whole blocks of the prompts that run on each engine, with the number of prompts that hold
        each."""
        self._parts = [0] * len(self._engines)
        """The count of partial last blocks of those prompts."""

    def choose(self, index: int, request: TracedRequest, replica: int) -> tuple[int, int]:
        whole = _whole_blocks(request.block_ids, request.prompt_count)
        held = [engine.cache.match(whole, len(whole)) for engine in self._engines]
        costs = [
            self._cost(worker, request.prompt_count, whole, blocks) for worker, blocks in enumerate(held)
        ]
        least = min(costs)
        equals = [number for number, cost in enumerate(costs) if cost == least]
        self._chance.start_request(index)
        worker = self._chance.choice(equals) if len(equals) > 1 else equals[0]
        self._queued[worker] += request.prompt_count - held[worker] * TRACE_BLOCK_SIZE
        self._running[worker].update(whole)
        self._parts[worker] += len(request.block_ids) - len(whole)
        return worker, held[worker]

    def first_token(self, sequence: ModelSequence) -> None:
        self._queued[sequence.worker] -= sequence.prompt_count - sequence.matched_count * TRACE_BLOCK_SIZE

    def finished(self, sequence: ModelSequence) -> None:
        running = self._running[sequence.worker]
        whole = _whole_blocks(sequence.hashes, sequence.prompt_count)
        running.subtract(whole)
        for block in whole:
            if not running[block]:
                del running[block]
        self._parts[sequence.worker] -= -(-sequence.prompt_count // TRACE_BLOCK_SIZE) - len(whole)

    def _cost(self, worker: int, prompt_count: int, whole: Sequence[int], held: int) -> float:
        running = self._running[worker]
        queued, blocks = self._queued[worker], len(running) + self._parts[worker]
        if self._queues:
            queued = self._engines[worker].prefill_token_count()
            blocks = self._engines[worker].block_count()
        blocks += -(-prompt_count // TRACE_BLOCK_SIZE) - sum(map(running.__contains__, whole))
        unread = (queued + prompt_count) / TRACE_BLOCK_SIZE - self._weights.overlap_score_credit * held
        return self._weights.prefill_load_scale * max(unread, 0.0) + blocks


def _whole_blocks(block_ids: Sequence[int], prompt_count: int) -> Sequence[int]:
    return block_ids[: prompt_count // TRACE_BLOCK_SIZE]


class KvAware:
    """The product's index, load book and selector in several replicas, with knowledge that comes late.

    KV events reach all replicas after `events_s`, a replica's bookings reach the others after `messages_s`
    (None: never). With `predict` each replica uses its own choices instead of events. Without `counts_once`
    a block counts in the load book for each request that holds it.
    """

    def __init__(
        self,
        simulation: Simulation,
        chance: Chance,
        *,
        replicas: int = 1,
        weights: CostWeights = _WEIGHTS,
        events_s: float = 0.0,
        messages_s: float | None = 0.0,
        predict: bool = False,
        counts_once: bool = True,
    ) -> None:
        self._simulation = simulation
        self._chance = chance
        self._counts_once = counts_once
        self._workers = [Worker(number) for number in range(len(simulation.engines))]
        self._selector = Selector(chance)
        self._weights = weights
        self._events_s = events_s
        self._messages_s = messages_s
        self._books = [LoadBook() for _ in range(replicas)]
        self._index = KvIndex()
        self._predicted = (
            [PredictedIndex(ttl_s=RouterSettings.load().router_ttl_s) for _ in range(replicas)]
            if predict
            else None
        )
        if not predict:
            simulation.on_kv_event = self._apply_later

    def choose(self, index: int, request: TracedRequest, replica: int) -> tuple[int, int]:
        whole = _whole_blocks(request.block_ids, request.prompt_count)
        names = pack_names(whole) if self._counts_once else b""
        self._chance.start_request(index)
        known = self._index if self._predicted is None else self._predicted[replica]
        choice = self._selector.select(
            self._workers,
            known.find(whole),
            self._books[replica],
            token_count=request.prompt_count,
            block_size=TRACE_BLOCK_SIZE,
            weights=self._weights,
            active=self._books[replica].active(names),
        )
        if self._predicted is not None:
            self._predicted[replica].predict(choice.worker, whole, self._simulation.now_s)
        held = choice.matched.device
        self._update_books(
            replica,
            lambda book: book.add(
                str(replica),
                str(index),
                choice.worker,
                prefill_tokens=request.prompt_count - held * TRACE_BLOCK_SIZE,
                blocks=len(request.block_ids),
                deadline=math.inf,
                names=names,
            ),
        )
        return choice.worker.instance_id, held

    def first_token(self, sequence: ModelSequence) -> None:
        owner, request_id = str(sequence.replica), str(sequence.index)
        self._update_books(sequence.replica, lambda book: book.prefill_done(owner, request_id))

    def finished(self, sequence: ModelSequence) -> None:
        owner, request_id = str(sequence.replica), str(sequence.index)
        self._update_books(sequence.replica, lambda book: book.free(owner, request_id))

    def _update_books(self, replica: int, change: Callable[[LoadBook], None]) -> None:
        change(self._books[replica])
        if self._messages_s is None:
            return
        for other, book in enumerate(self._books):
            if other != replica:
                self._simulation.after(self._messages_s, partial(change, book))

    def _apply_later(self, worker: int, event: KvEvent) -> None:
        converted = _to_router_event(event)
        if self._events_s:
            self._simulation.after(self._events_s, lambda: self._index.apply(Worker(worker), [converted]))
        else:
            self._index.apply(Worker(worker), [converted])


def _to_router_event(event: KvEvent) -> kv_event.KvEvent:
    """Convert an engine's event to the form that routers receive; in the simulation both name blocks
    alike."""
    match event:
        case BlocksStored(block_hashes=hashes):
            return kv_event.stored(hashes)
        case BlocksRemoved(block_hashes=hashes):
            return kv_event.removed(hashes)
        case AllBlocksCleared():
            return kv_event.cleared()


class _Seen:
    """A worker as one replica's client sees it."""

    def __init__(self, number: int) -> None:
        self.instance_id = number
        self.in_flight = 0


class Blind:
    """The client's own policies (`round_robin`, `p2c`, …), each replica with its own counts."""

    def __init__(self, simulation: Simulation, mode: str, replicas: int, chance: Chance) -> None:
        workers = range(len(simulation.engines))
        self._chance = chance
        self._seen = [[_Seen(number) for number in workers] for _ in range(replicas)]
        self._policies = [selection.policy(mode, chance) for _ in range(replicas)]

    def choose(self, index: int, request: TracedRequest, replica: int) -> tuple[int, int]:
        self._chance.start_request(index)
        chosen = self._policies[replica](self._seen[replica])
        chosen.in_flight += 1
        return chosen.instance_id, 0

    def first_token(self, sequence: ModelSequence) -> None:
        pass

    def finished(self, sequence: ModelSequence) -> None:
        self._seen[sequence.replica][sequence.worker].in_flight -= 1
