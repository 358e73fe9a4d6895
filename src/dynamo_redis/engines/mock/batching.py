"""Continuous batching, and the duration of its steps. Pure.

A step computes up to `max_num_batched_tokens` tokens: first one token for each running sequence that decodes,
and the next chunk of prompt for each that is still in prefill; then the prompts of waiting sequences, in
order of arrival, within the limits of sequences (`max_num_seqs`), tokens and KV blocks. A sequence whose
tokens are all computed yields its next token at the end of the step.

A sequence gets the blocks of its whole prompt when it is admitted, and one more each time it has filled one.
If no block is free, the sequence that was admitted last is preempted: it gives up all its blocks and waits,
first in the queue, to be computed again. The oldest running sequence can take the blocks of all others, and a
sequence that does not fit alone is not accepted. That guarantees progress.

**Timing.** The default numbers are those of a model of 8 billion parameters (bf16) on one H100-class GPU:

- `decode_step_s` 8 ms a step: 16 GB of weights at 3.35 TB/s take 5 ms, and launches and sampling the rest;
- `decode_sequence_s` 0.03 ms for each decoding sequence in the step: the GPU reads its keys and values (130
  KB a token of context; about 800 tokens);
- `prefill_token_s` 0.05 ms a prompt token: 16 GFLOP at a third of the peak, or 20,000 tokens a second.

One request alone gets 125 tokens a second, each of 256 at once gets 64, and the prefill of a new prompt of
4,000 tokens takes 0.2 s. Prompt tokens found in the KV cache take no time. All durations are divided by
`speedup_ratio`.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.mock.kv_cache import BlockCache, BlockTable
from dynamo_redis.errors import Overloaded
from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, salted_seed


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One request in the batch: the tokens of its prompt, then the generated ones.

    `hashes` are the sequence hashes of its full blocks, at least of the prompt's. `room_count` and
    `next_store_at` follow from `blocks`; they are kept since each step asks for them.
    """

    tokens: array[int]
    prompt_count: int
    hashes: list[int]
    blocks: BlockTable = field(default_factory=BlockTable)
    computed_count: int = 0
    room_count: int = 0
    """Tokens for which it has blocks."""
    next_store_at: int = 0
    """The count of computed tokens at which its first private block is full."""
    cached_count: int | None = None  # prompt tokens found in the cache at first admission
    state: Literal["new", "waiting", "running", "removed"] = "new"

    @property
    def generated_count(self) -> int:
        """The number of tokens generated so far."""
        return len(self.tokens) - self.prompt_count


S = TypeVar("S", bound=Sequence)


@dataclass(slots=True)
class StepPlan(Generic[S]):
    """The work of one step: sequences, each with the number of its tokens to compute."""

    work: list[tuple[S, int]]
    prefill_token_count: int
    decode_count: int


def step_duration_s(step: StepPlan[S], settings: MockEngineSettings) -> float:
    """Return the duration of a step at `speedup_ratio`, in seconds; 0 if the ratio is 0."""
    return work_duration_s(step.prefill_token_count, step.decode_count, settings)


def work_duration_s(prefill_token_count: int, decode_count: int, settings: MockEngineSettings) -> float:
    """Return the duration of a step with this work, as `step_duration_s` does."""
    if not settings.speedup_ratio:
        return 0.0
    duration_s = (
        settings.decode_step_s
        + settings.decode_sequence_s * decode_count
        + settings.prefill_token_s * prefill_token_count
    )
    return duration_s / settings.speedup_ratio


class Batch(Generic[S]):
    """The running and the waiting sequences, over one KV cache.

    `submit` sequences, and call `plan` and `complete` in turn; `remove` a sequence at any time. The batch has
    at most `max_num_seqs + max_num_waiting` sequences; then `submit` raises Overloaded.
    """

    def __init__(
        self, cache: BlockCache, *, max_num_seqs: int, max_num_batched_tokens: int, max_num_waiting: int
    ) -> None:
        self.cache = cache
        self.preemption_count = 0
        self.prompt_token_count = 0  # of all prompts admitted so far, each counted once
        self.cached_token_count = 0  # of these tokens, those that were found in the cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_count = max_num_seqs + max_num_waiting
        self._running: list[S] = []  # in order of admission
        self._waiting: deque[S] = deque()
        self._blocked: tuple[S, int] | None = (
            None  # the first waiting sequence, and the `release_count` at which it did not fit
        )

    @property
    def running_count(self) -> int:
        """The number of sequences that hold KV blocks."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """The number of sequences that wait to be admitted."""
        return len(self._waiting)

    def waiting(self) -> Collection[S]:
        """Return a live view of the sequences that wait to be admitted."""
        return self._waiting

    def sequences(self) -> list[S]:
        """Return all sequences, the running ones first."""
        return [*self._running, *self._waiting]

    def submit(self, sequence: S) -> None:
        """Add a sequence, which must fit into the cache alone with its longest answer. Raises Overloaded."""
        if len(self._running) + len(self._waiting) >= self._max_count:
            raise Overloaded(f"the engine has {self._max_count} requests running and waiting, its limit")
        sequence.state = "waiting"
        self._waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Remove a sequence, finished or not, and free its blocks at once. Idempotent."""
        if sequence.state == "running":
            self._running.remove(sequence)
            self.cache.release(sequence.blocks)
        elif sequence.state == "waiting":
            self._waiting.remove(sequence)
        sequence.state = "removed"

    def plan(self) -> StepPlan[S] | None:
        """Plan the next step and reserve its blocks; return None if there is no work.

        Running sequences come first. Then waiting ones are admitted, in order, until one does not fit; none
        is admitted in a step that preempted one.
        """
        work: list[tuple[S, int]] = []
        budget = self._max_num_batched_tokens  # tokens that the step has left
        decode_count = 0
        preempted_before = self.preemption_count
        self.cache.hold_removals()
        try:
            for sequence in self._running:  # which loses sequences at its end when they are preempted
                if not budget:
                    break
                computed_count = sequence.computed_count
                count = min(len(sequence.tokens) - computed_count, budget)
                end = computed_count + count
                if end > sequence.room_count and not self._make_room(sequence, end):
                    continue
                work.append((sequence, count))
                budget -= count
                decode_count += computed_count >= sequence.prompt_count
            if self._waiting and self.preemption_count == preempted_before:
                first = len(work)
                budget = self._admit_waiting(work, budget)
                decode_count += sum(each.computed_count >= each.prompt_count for each, _ in work[first:])
        finally:
            self.cache.report_removals()
        if not work:
            return None
        token_count = self._max_num_batched_tokens - budget
        return StepPlan(work, prefill_token_count=token_count - decode_count, decode_count=decode_count)

    def _admit_waiting(self, work: list[tuple[S, int]], budget: int) -> int:
        """Admit waiting sequences and add their first tokens to a step; return the budget that is left."""
        while self._waiting and budget and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if self._blocked == (sequence, self.cache.release_count):
                break
            if not self._admit(sequence):
                self._blocked = (sequence, self.cache.release_count)
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.state = "running"
            count = min(len(sequence.tokens) - sequence.computed_count, budget)
            work.append((sequence, count))
            budget -= count
        return budget

    def complete(self, step: StepPlan[S]) -> list[S]:
        """Note that a step is computed: store its full blocks; return the sequences that yield a token
        now."""
        due: list[S] = []
        for sequence, count in step.work:
            if sequence.state != "running":  # removed while the step was under way
                continue
            computed_count = sequence.computed_count + count
            sequence.computed_count = computed_count
            if computed_count >= sequence.next_store_at:
                self._store_full(sequence)
            if computed_count == len(sequence.tokens):
                due.append(sequence)
        return due

    def _store_full(self, sequence: S) -> None:
        """Store the blocks of a sequence that are full and not stored yet."""
        block_size, hashes, tokens = self.cache.block_size, sequence.hashes, sequence.tokens
        first, end = len(sequence.blocks.stored), sequence.computed_count // block_size
        if len(hashes) < end:
            salt = sequence.blocks.cache_salt
            seed = salted_seed(salt) if salt else SEED
            fresh = local_hashes(tokens[len(hashes) * block_size : end * block_size], block_size, seed=seed)
            hashes.extend(chain(fresh, hashes[-1] if hashes else None, seed=seed))
        self.cache.store(sequence.blocks, hashes[first:end], tokens[first * block_size : end * block_size])
        self._measure(sequence)

    def _measure(self, sequence: S) -> None:
        """Note the counts that follow from a sequence's blocks."""
        blocks, block_size = sequence.blocks, self.cache.block_size
        sequence.room_count = blocks.block_count * block_size
        sequence.next_store_at = (len(blocks.stored) + 1) * block_size

    def _make_room(self, sequence: S, token_count: int) -> bool:
        """Reserve blocks for `token_count` tokens of a running sequence, preempting later ones if needed.

        Returns False if the sequence itself was preempted.
        """
        missing_count = -(-token_count // self.cache.block_size) - sequence.blocks.block_count
        while missing_count > 0 and not self.cache.reserve(sequence.blocks, missing_count):
            victim = self._running.pop()
            victim.state = "waiting"
            victim.computed_count = 0
            self.cache.release(victim.blocks)
            self._waiting.appendleft(victim)
            self.preemption_count += 1
            if victim is sequence:
                return False
        self._measure(sequence)
        return True

    def _admit(self, sequence: S) -> bool:
        """Reserve the blocks of a waiting sequence; return False if they do not fit into the cache now."""
        block_size = self.cache.block_size
        # The last token is computed even if its block is stored: the next token depends on it.
        reusable_count = min((len(sequence.tokens) - 1) // block_size, len(sequence.hashes))
        matched_count = self.cache.match(sequence.hashes, reusable_count)
        self.cache.hold(sequence.blocks, sequence.hashes[:matched_count])
        if not self.cache.reserve(sequence.blocks, -(-len(sequence.tokens) // block_size) - matched_count):
            self.cache.release(sequence.blocks)
            return False
        self._measure(sequence)
        sequence.computed_count = matched_count * block_size
        if sequence.cached_count is None:
            sequence.cached_count = sequence.computed_count
            self.cached_token_count += sequence.computed_count
            self.prompt_token_count += sequence.prompt_count
        return True
