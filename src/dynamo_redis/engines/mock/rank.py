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
from dynamo_redis.engines.mock.batching import Batch, Sequence, busy_s, step_duration_s
from dynamo_redis.engines.mock.kv_cache import BlockCache
from dynamo_redis.errors import Draining, PlaneError
from dynamo_redis.models.llm_protocol import FinishReason, GenerateItem

log = logging.getLogger(__name__)

_LARGEST_LAG_S = 0.05
"""How far behind its schedule the step loop tries to catch up; a longer hang of the loop is lost time."""


@dataclass(slots=True, eq=False, kw_only=True)
class Answer(Sequence):
    """A request and its answer so far. `ready` holds at most the answer's tokens, `max_tokens`."""

    text: Iterator[int]
    natural_length: int
    min_tokens: int
    max_tokens: int
    stop_ids: frozenset[int]
    ready: deque[GenerateItem] = field(default_factory=deque)
    ended: PlaneError | None = None
    waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _Computed(NamedTuple):
    """What is remembered of a step; its sequences are not."""

    sequence_count: int
    prefill_token_count: int
    decode_count: int


class MockRank:
    """It owns one task, the step loop, which sleeps while nothing runs."""

    def __init__(self, settings: MockEngineSettings, dp_rank: int) -> None:
        self.dp_rank = dp_rank
        self.cache = BlockCache(settings.total_kv_blocks, settings.block_size)
        self.batch: Batch[Answer] = Batch(
            self.cache,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_waiting=settings.max_num_waiting,
        )
        self.steps: asyncio.Task[None] | None = None
        self._settings = settings
        self._work_came: asyncio.Future[None] | None = None
        self._step_count = 0
        self._last_step = _Computed(0, 0, 0)

    @property
    def running(self) -> bool:
        """The step loop runs."""
        return self.steps is not None and not self.steps.done()

    @property
    def request_count(self) -> int:
        """Requests that are being answered or wait."""
        return self.batch.running_count + self.batch.waiting_count

    def start(self) -> None:
        """Start the step loop."""
        self.steps = asyncio.create_task(self._run(), name=f"mock engine steps, rank {self.dp_rank}")
        self.steps.add_done_callback(_report_failure)

    async def aclose(self) -> None:
        """End the step loop; requests still under way end with Draining. Idempotent."""
        if self.steps is not None:
            self.steps.cancel()
            await asyncio.wait([self.steps])
            self._end_all()

    def load(self) -> EngineLoad:
        """What the rank has to do now."""
        batch = self.batch
        return EngineLoad(
            dp_rank=self.dp_rank,
            running_count=batch.running_count,
            waiting_count=batch.waiting_count,
            active_blocks=self.cache.active_count,
            total_blocks=self.cache.total_blocks,
            prefix_hit_rate=batch.cached_token_count / batch.prompt_token_count
            if batch.prompt_token_count
            else None,
            last_pass=self._last_pass() if self._step_count else None,
        )

    def _last_pass(self) -> ForwardPass:
        waiting = self.batch.waiting()
        step = self._last_step
        return ForwardPass(
            number=self._step_count,
            prefill_request_count=step.sequence_count - step.decode_count,
            prefill_token_count=step.prefill_token_count,
            decode_request_count=step.decode_count,
            duration_s=busy_s(step.prefill_token_count, step.decode_count, self._settings),
            waiting_request_count=len(waiting),
            waiting_token_count=sum(answer.prompt_count for answer in waiting),
        )

    # ----------------------------------------------------------------- a request

    def submit(self, answer: Answer) -> None:
        """Take a request. Raises Draining, Overloaded."""
        if not self.running:
            raise Draining("the engine is not running")
        self.batch.submit(answer)
        if self._work_came is not None and not self._work_came.done():
            self._work_came.set_result(None)

    def cancel(self, answer: Answer) -> None:
        """End a request whose caller has stopped it."""
        self.batch.remove(answer)
        answer.ready.clear()
        answer.ready.append({"token_ids": [], "finish_reason": "cancelled"})
        answer.wake()

    def _yield_token(self, answer: Answer) -> None:
        """One more token, or the end. Runs when all tokens of the answer so far are computed."""
        generated_count = answer.generated_count
        may_stop = generated_count >= answer.min_tokens
        if may_stop and generated_count >= answer.natural_length:
            self._finish(answer, [], "stop")
            return
        token = next(answer.text)
        if may_stop and token in answer.stop_ids:
            self._finish(answer, [], "stop")
            return
        answer.tokens.append(token)
        if generated_count + 1 >= answer.max_tokens:
            self._finish(answer, [token], "length")
            return
        item: GenerateItem = {"token_ids": [token]}
        if not generated_count:
            item["cached_tokens"] = answer.cached_count or 0
        answer.ready.append(item)
        answer.wake()

    def _finish(self, answer: Answer, token_ids: list[int], reason: FinishReason) -> None:
        item: GenerateItem = {"token_ids": token_ids, "finish_reason": reason}
        if answer.generated_count <= len(token_ids):
            item["cached_tokens"] = answer.cached_count or 0
        self.batch.remove(answer)
        answer.ready.append(item)
        answer.wake()

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
                # Timers come late; counting from when the step was due keeps the rate right on average.
                now = loop.time()
                due_at = max(due_at, now - _LARGEST_LAG_S) + step_duration_s(step, self._settings)
                await asyncio.sleep(max(due_at - now, 0))
                self._step_count += 1
                self._last_step = _Computed(len(step.work), step.prefill_token_count, step.decode_count)
                for answer in self.batch.complete(step):
                    self._yield_token(answer)
        finally:
            self._end_all()

    def _end_all(self) -> None:
        for answer in self.batch.sequences():
            self.batch.remove(answer)
            answer.ended = Draining("the engine has stopped")
            answer.wake()


def _report_failure(steps: asyncio.Task[None]) -> None:
    if not steps.cancelled() and (failure := steps.exception()) is not None:
        log.error("the mock engine's step loop failed; it serves no more", exc_info=failure)
