"""One data-parallel rank of the mock engine: its cache, its batch, and the loop that computes steps."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import EngineLoad, ForwardPass
from dynamo_redis.engines.mock.batching import Batch, Sequence, step_duration_s, work_duration_s
from dynamo_redis.engines.mock.kv_cache import BlockCache
from dynamo_redis.errors import Draining, PlaneError
from dynamo_redis.models.llm_protocol import FinishReason, GenerateItem

log = logging.getLogger(__name__)

_LARGEST_LAG_S = 0.05
"""The greatest delay that the step loop catches up; the rest of a longer delay is lost time."""


@dataclass(slots=True, eq=False, kw_only=True)
class StreamedSequence(Sequence):
    """A sequence whose answer is streamed.

    `text` yields the tokens of the answer. `ready` has the items that are not sent yet, at most `max_tokens`.
    """

    text: Iterator[int]
    natural_length: int
    min_tokens: int
    max_tokens: int
    stop_ids: frozenset[int]
    top_count: int | None = None
    """The number of likeliest tokens to name at each place; None: no log probabilities."""
    ready: deque[GenerateItem] = field(default_factory=deque)
    ended: PlaneError | None = None
    waiter: asyncio.Future[None] | None = None

    def item(self, token_ids: list[int]) -> GenerateItem:
        """Return an item with these tokens, and their log probabilities if they are asked for."""
        item: GenerateItem = {"token_ids": token_ids}
        if self.top_count is not None:
            item["log_probs"] = [_logprob(token_id, 0) for token_id in token_ids]
            item["top_logprobs"] = [
                [
                    {
                        "token_id": max(token_id - rank, 0),
                        "logprob": _logprob(token_id, rank),
                        "rank": rank + 1,
                    }
                    for rank in range(self.top_count)
                ]
                for token_id in token_ids
            ]
        return item

    def wake(self) -> None:
        """Wake the coroutine that waits for `ready` or `ended`."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _StepCounts(NamedTuple):
    """The counts of a step, without its sequences."""

    sequence_count: int
    prefill_token_count: int
    decode_count: int


class MockRank:
    """One rank. It owns one task, the step loop, which sleeps while there is no request."""

    def __init__(self, settings: MockEngineSettings, dp_rank: int) -> None:
        self.dp_rank = dp_rank
        self.cache = BlockCache(settings.total_kv_blocks, settings.block_size)
        self.batch: Batch[StreamedSequence] = Batch(
            self.cache,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_waiting=settings.max_num_waiting,
        )
        self.steps: asyncio.Task[None] | None = None
        self._settings = settings
        self._work_came: asyncio.Future[None] | None = None
        self._step_count = 0
        self._last_step = _StepCounts(0, 0, 0)

    @property
    def running(self) -> bool:
        """True while the step loop runs."""
        return self.steps is not None and not self.steps.done()

    @property
    def request_count(self) -> int:
        """The number of requests that run or wait."""
        return self.batch.running_count + self.batch.waiting_count

    def start(self) -> None:
        """Start the step loop."""

        def report_failure(steps: asyncio.Task[None]) -> None:
            if not steps.cancelled() and (failure := steps.exception()) is not None:
                log.error("the mock engine's step loop failed; it serves no more", exc_info=failure)

        self.steps = asyncio.create_task(self._run(), name=f"mock engine steps, rank {self.dp_rank}")
        self.steps.add_done_callback(report_failure)

    async def aclose(self) -> None:
        """End the step loop; requests under way end with Draining. Idempotent."""
        if self.steps is not None:
            self.steps.cancel()
            await asyncio.wait([self.steps])
            self._end_all()

    def load(self) -> EngineLoad:
        """Return the rank's present load."""
        batch, waiting, step = self.batch, self.batch.waiting(), self._last_step
        last_pass = ForwardPass(
            number=self._step_count,
            prefill_request_count=step.sequence_count - step.decode_count,
            prefill_token_count=step.prefill_token_count,
            decode_request_count=step.decode_count,
            duration_s=work_duration_s(step.prefill_token_count, step.decode_count, self._settings),
            waiting_request_count=len(waiting),
            waiting_token_count=sum(sequence.prompt_count for sequence in waiting),
        )
        hit_rate = None
        if batch.prompt_token_count:
            hit_rate = batch.cached_token_count / batch.prompt_token_count
        return EngineLoad(
            dp_rank=self.dp_rank,
            running_count=batch.running_count,
            waiting_count=batch.waiting_count,
            active_blocks=self.cache.active_count,
            total_blocks=self.cache.total_blocks,
            prefix_hit_rate=hit_rate,
            last_pass=last_pass if self._step_count else None,
        )

    # ----------------------------------------------------------------- a request

    def submit(self, sequence: StreamedSequence) -> None:
        """Add a request. Raises Draining or Overloaded."""
        if not self.running:
            raise Draining("the engine is not running")
        self.batch.submit(sequence)
        if self._work_came is not None and not self._work_came.done():
            self._work_came.set_result(None)

    def cancel(self, sequence: StreamedSequence) -> None:
        """End a request that its caller has stopped, with an item `cancelled`."""
        self.batch.remove(sequence)
        sequence.ready.clear()
        sequence.ready.append({"token_ids": [], "finish_reason": "cancelled"})
        sequence.wake()

    def _yield_token(self, sequence: StreamedSequence) -> None:
        """Add one more token to an answer, or end it. All its tokens so far are computed."""
        generated_count = len(sequence.tokens) - sequence.prompt_count
        may_stop = generated_count >= sequence.min_tokens
        if may_stop and generated_count >= sequence.natural_length:
            self._finish(sequence, [], "stop")
            return
        token = next(sequence.text)
        if may_stop and token in sequence.stop_ids:
            self._finish(sequence, [], "stop")
            return
        sequence.tokens.append(token)
        if generated_count + 1 >= sequence.max_tokens:
            self._finish(sequence, [token], "length")
            return
        item = sequence.item([token])
        if not generated_count:
            item["cached_tokens"] = sequence.cached_count or 0
        sequence.ready.append(item)
        sequence.wake()

    def _finish(self, sequence: StreamedSequence, token_ids: list[int], reason: FinishReason) -> None:
        item = sequence.item(token_ids)
        item["finish_reason"] = reason
        if sequence.generated_count <= len(token_ids):
            item["cached_tokens"] = sequence.cached_count or 0
        self.batch.remove(sequence)
        sequence.ready.append(item)
        sequence.wake()

    # ----------------------------------------------------------------- the step loop

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_at = loop.time()
        try:
            while True:
                step = self.batch.plan()
                if step is None:
                    self._work_came = loop.create_future()
                    await self._work_came
                    due_at = loop.time()
                    continue
                # Timers fire late; counting from the time at which the step was due keeps the mean rate
                # exact.
                now = loop.time()
                due_at = max(due_at, now - _LARGEST_LAG_S) + step_duration_s(step, self._settings)
                await asyncio.sleep(max(due_at - now, 0))
                self._step_count += 1
                self._last_step = _StepCounts(len(step.work), step.prefill_token_count, step.decode_count)
                for sequence in self.batch.complete(step):
                    self._yield_token(sequence)
        finally:
            self._end_all()

    def _end_all(self) -> None:
        for sequence in self.batch.sequences():
            self.batch.remove(sequence)
            sequence.ended = Draining("the engine has stopped")
            sequence.wake()


def _logprob(token_id: int, rank: int) -> float:
    """Return a log probability: the chosen token is the likeliest, and each further one is less likely."""
    return -(token_id % 8) / 16 - rank
