"""A deployment in simulated time: the mock engine's own cache and batching, without processes and waiting.

Real runs are compared with it. `Omniscient` routers see every cache and every queue as they are at that
moment, which no process can. It also shows the cost of a policy with delayed knowledge, without the noise of
a machine.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol

from benchmarks.replay.figures import Outcome
from benchmarks.replay.trace import TRACE_BLOCK_SIZE, TracedRequest
from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import KvEvent, KvEventSink
from dynamo_redis.engines.mock import batching
from dynamo_redis.engines.mock.batching import Batch, StepPlan, step_duration_s
from dynamo_redis.engines.mock.kv_cache import BlockCache

_TOKEN_BASE: Final = 1 << 31
"""Base of the generated tokens: those of request i are all `_TOKEN_BASE + i`. So no two answers share a
block."""


@dataclass(slots=True, eq=False, kw_only=True)
class ModelSequence(batching.Sequence):
    """A request in a simulated engine."""

    index: int
    replica: int
    output_count: int
    arrived_s: float
    worker: int
    matched_count: int


class Policy(Protocol):
    """Chooses a worker for each request, on one of the router replicas, and is told of the request's
    progress."""

    def choose(self, index: int, request: TracedRequest, replica: int) -> tuple[int, int]:
        """Return the worker, and the number of the prompt's blocks that it is believed to hold."""
        ...

    def first_token(self, sequence: ModelSequence) -> None: ...

    def finished(self, sequence: ModelSequence) -> None: ...


class SimulatedEngine:
    """One worker: `Batch` over `BlockCache`, with the mock engine's timing."""

    def __init__(self, settings: MockEngineSettings, events: KvEventSink) -> None:
        self._settings = settings
        self.cache = BlockCache(settings.total_kv_blocks, settings.block_size, events)
        self.batch: Batch[ModelSequence] = Batch(
            self.cache,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_waiting=settings.max_num_waiting,
        )
        self._step: StepPlan[ModelSequence] | None = None

    @property
    def idle(self) -> bool:
        """True if no step is under way."""
        return self._step is None

    def begin_step(self) -> float | None:
        """Begin a step and return its length in seconds; None if there is nothing to do."""
        self._step = self.batch.plan()
        return None if self._step is None else step_duration_s(self._step, self._settings)

    def complete_step(self) -> list[ModelSequence]:
        """End the step, and return the sequences that have another token."""
        assert self._step is not None
        return self.batch.complete(self._step)

    def prefill_token_count(self) -> int:
        """Return the prompt tokens that are still to be read, without those in the cache."""
        total = 0
        for sequence in self.batch.sequences():
            unread = sequence.prompt_count - sequence.computed_count
            if unread > 0:
                if sequence.state == "waiting":
                    reusable = (sequence.prompt_count - 1) // self.cache.block_size
                    unread -= self.cache.match(sequence.hashes, reusable) * self.cache.block_size
                total += unread
        return total

    def block_count(self) -> int:
        """Return the blocks that running requests hold and waiting ones will hold, each counted once."""
        block_size = self.cache.block_size
        sequences = self.batch.sequences()
        named = set().union(*(sequence.hashes for sequence in sequences))
        return len(named) + sum(
            -(-len(sequence.tokens) // block_size) - len(sequence.hashes) for sequence in sequences
        )


class Simulation:
    """Engines and their simulated time. To use it, make it, make a policy for it, and call `run`."""

    def __init__(self, workers: int, settings: MockEngineSettings) -> None:
        self.now_s = 0.0
        self.on_kv_event: Callable[[int, KvEvent], None] = lambda _, __: None
        """Called at once with the worker's number and each change of its cache."""
        self.engines = [SimulatedEngine(settings, self._sink(number)) for number in range(workers)]
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._turn = count()
        self._outcomes: list[Outcome] = []

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Call `act` after a delay. Acts that are due at the same moment run in the order of their calls."""
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._turn), act))

    def run(self, requests: Sequence[TracedRequest], policy: Policy, *, replicas: int = 1) -> list[Outcome]:
        """Answer all requests, which come to the replicas in turn. Returns one outcome a request, as they
        end."""
        for index, request in enumerate(requests):
            self.after(
                request.arrival_s - self.now_s, self._arrival(policy, index, request, index % replicas)
            )
        while self._due:
            self.now_s, _, act = heapq.heappop(self._due)
            act()
        return self._outcomes

    def _sink(self, worker: int) -> KvEventSink:
        return lambda event: self.on_kv_event(worker, event)

    def _arrival(
        self, policy: Policy, index: int, request: TracedRequest, replica: int
    ) -> Callable[[], None]:
        def arrive() -> None:
            worker, matched_count = policy.choose(index, request, replica)
            sequence = ModelSequence(
                tokens=array("I", bytes(4 * request.prompt_count)),
                prompt_count=request.prompt_count,
                hashes=list(request.block_ids[: request.prompt_count // TRACE_BLOCK_SIZE]),
                index=index,
                replica=replica,
                output_count=request.output_count,
                arrived_s=self.now_s,
                worker=worker,
                matched_count=matched_count,
            )
            engine = self.engines[worker]
            engine.batch.submit(sequence)
            if engine.idle:
                self._begin_step(policy, engine)

        return arrive

    def _begin_step(self, policy: Policy, engine: SimulatedEngine) -> None:
        duration_s = engine.begin_step()
        if duration_s is not None:
            self.after(duration_s, lambda: self._end_step(policy, engine))

    def _end_step(self, policy: Policy, engine: SimulatedEngine) -> None:
        for sequence in engine.complete_step():
            if not sequence.generated_count:
                policy.first_token(sequence)
                self._outcomes.append(
                    Outcome(
                        index=sequence.index,
                        worker=sequence.worker,
                        prompt_count=sequence.prompt_count,
                        cached_count=sequence.cached_count or 0,
                        matched_count=sequence.matched_count * TRACE_BLOCK_SIZE,
                        ttft_s=self.now_s - sequence.arrived_s,
                    )
                )
            sequence.tokens.append(_TOKEN_BASE + sequence.index)
            if sequence.generated_count == sequence.output_count:
                engine.batch.remove(sequence)
                policy.finished(sequence)
        self._begin_step(policy, engine)
