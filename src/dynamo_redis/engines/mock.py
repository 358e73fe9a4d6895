"""The mock engine: a GPU engine in all but the GPU.

It batches continuously, keeps a paged KV cache with prefix reuse, takes the time a real engine would
(`batching.py` has the model of both), reports its KV events, and answers in readable text. The answer
depends on the prompt and the seed alone, not on what else runs.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from tokenizers import Tokenizer
from xxhash import xxh3_64_intdigest

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import EngineCapacity, KvEventSink
from dynamo_redis.engines.batching import Batch, Sequence, step_duration_s
from dynamo_redis.engines.kv_cache import BlockCache
from dynamo_redis.engines.text import Phrasebook
from dynamo_redis.errors import ConfigError, Draining, InvalidRequest, ModelError, PlaneError
from dynamo_redis.planes.context import Context
from dynamo_redis.router.hashing import chain, local_hashes
from dynamo_redis.runtime.llm_protocol import FinishReason, GenerateItem, GenerateRequest
from dynamo_redis.runtime.model_files import ModelDirectory

log = logging.getLogger(__name__)

_LARGEST_LAG_S = 0.05
"""How far behind its schedule the step loop tries to catch up; a longer hang of the loop is lost time."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Answer(Sequence):
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


class MockEngine:
    """An `Engine` without a model. It owns one task, the step loop, which sleeps while nothing runs."""

    def __init__(
        self,
        settings: MockEngineSettings,
        model: ModelDirectory,
        *,
        kv_events: KvEventSink | None = None,
    ) -> None:
        """Raises ConfigError if the settings contradict each other."""
        if settings.max_num_batched_tokens < settings.max_num_seqs:
            raise ConfigError(
                f"DYN_MOCK_MAX_NUM_BATCHED_TOKENS={settings.max_num_batched_tokens} must be at least "
                f"DYN_MOCK_MAX_NUM_SEQS={settings.max_num_seqs}: each running request takes a token a step"
            )
        self._settings = settings
        self._model = model
        self._cache = BlockCache(settings.total_kv_blocks, settings.block_size, kv_events)
        self._batch: Batch[_Answer] = Batch(
            self._cache,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_waiting=settings.max_num_waiting,
        )
        self._phrasebook: Phrasebook | None = None
        self._steps: asyncio.Task[None] | None = None
        self._work_came: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<MockEngine {self.running_count} running, {self.waiting_count} waiting, {self._cache}>"

    @property
    def capacity(self) -> EngineCapacity:
        return EngineCapacity(
            total_kv_blocks=self._settings.total_kv_blocks,
            kv_block_size=self._settings.block_size,
            max_num_seqs=self._settings.max_num_seqs,
            max_num_batched_tokens=self._settings.max_num_batched_tokens,
        )

    @property
    def cache(self) -> BlockCache:
        """The KV cache, to look at."""
        return self._cache

    @property
    def running_count(self) -> int:
        """Requests that are being answered."""
        return self._batch.running_count

    @property
    def waiting_count(self) -> int:
        """Requests that wait for their turn."""
        return self._batch.waiting_count

    async def start(self) -> None:
        """Load the tokenizer and start the step loop. Raises ModelError."""
        self._phrasebook = await anyio.to_thread.run_sync(_load_phrasebook, self._model)
        self._steps = asyncio.create_task(self._run(), name="mock engine steps")
        self._steps.add_done_callback(_report_failure)

    async def aclose(self) -> None:
        """End the step loop; requests still under way end with Draining. Idempotent."""
        if self._steps is not None:
            self._steps.cancel()
            await asyncio.wait([self._steps])
            self._end_all()

    async def clear_kv_blocks(self) -> int:
        return self._cache.clear()

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Answer token by token, as `Engine` demands.

        A prompt that fills the model's context, or the whole KV cache, is an InvalidRequest; an answer that
        would is ended with `length`. A stopped request ends with an item `cancelled`.
        """
        answer = self._open(request)
        unsubscribe = context.on_cancel(lambda _: self._cancel(answer))
        try:
            while True:
                while answer.ready:
                    item = answer.ready.popleft()
                    yield item
                    if "finish_reason" in item:
                        return
                if answer.ended is not None:
                    raise answer.ended
                answer.waiter = asyncio.get_running_loop().create_future()
                await answer.waiter
        finally:
            unsubscribe()
            self._batch.remove(answer)

    # ----------------------------------------------------------------- a request

    def _open(self, request: GenerateRequest) -> _Answer:
        if self._phrasebook is None or self._steps is None or self._steps.done():
            raise Draining("the engine is not running")
        answer = _read_request(request, self._phrasebook, self._settings, self._model.context_length)
        self._batch.submit(answer)
        if self._work_came is not None and not self._work_came.done():
            self._work_came.set_result(None)
        return answer

    def _cancel(self, answer: _Answer) -> None:
        self._batch.remove(answer)
        answer.ready.clear()
        answer.ready.append({"token_ids": [], "finish_reason": "cancelled"})
        answer.wake()

    def _yield_token(self, answer: _Answer) -> None:
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

    def _finish(self, answer: _Answer, token_ids: list[int], reason: FinishReason) -> None:
        item: GenerateItem = {"token_ids": token_ids, "finish_reason": reason}
        if answer.generated_count <= len(token_ids):
            item["cached_tokens"] = answer.cached_count or 0
        self._batch.remove(answer)
        answer.ready.append(item)
        answer.wake()

    # ----------------------------------------------------------------- the step loop

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_at = loop.time()
        try:
            while True:
                step = self._batch.plan()
                if step is None:
                    self._work_came = loop.create_future()
                    await self._work_came
                    due_at = loop.time()
                    continue
                # Timers come late; counting from when the step was due keeps the rate right on average.
                now = loop.time()
                due_at = max(due_at, now - _LARGEST_LAG_S) + step_duration_s(step, self._settings)
                await asyncio.sleep(max(due_at - now, 0))
                for answer in self._batch.complete(step):
                    self._yield_token(answer)
        finally:
            self._end_all()

    def _end_all(self) -> None:
        for answer in self._batch.sequences():
            self._batch.remove(answer)
            answer.ended = Draining("the engine has stopped")
            answer.wake()


def _report_failure(steps: asyncio.Task[None]) -> None:
    if not steps.cancelled() and (failure := steps.exception()) is not None:
        log.error("the mock engine's step loop failed; it serves no more", exc_info=failure)


def _load_phrasebook(model: ModelDirectory) -> Phrasebook:
    try:
        tokenizer = Tokenizer.from_buffer(model.read_tokenizer())
    except ModelError:
        raise
    except Exception as exc:  # the library raises bare Exception
        raise ModelError(f"{model.files['tokenizer.json'].path} is not a usable tokenizer: {exc}") from exc
    return Phrasebook(tokenizer)


# --------------------------------------------------------------------------- reading a request


def _read_request(
    request: object, phrasebook: Phrasebook, settings: MockEngineSettings, context_length: int
) -> _Answer:
    """The answer to be given. Raises InvalidRequest for what has no answer."""
    if not isinstance(request, Mapping):
        raise InvalidRequest(f"a request is an object, not {type(request).__name__}")
    prompt = _prompt(request)
    room_count = min(context_length, settings.total_kv_blocks * settings.block_size) - len(prompt)
    if room_count < 1:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, and no room for an answer: this worker holds at most "
            f"{room_count + len(prompt)} (context length {context_length}, KV cache "
            f"{settings.total_kv_blocks} blocks of {settings.block_size})"
        )
    stop = _mapping(request, "stop_conditions")
    sampling = _mapping(request, "sampling_options")
    max_tokens = _integer(stop, "max_tokens", default=room_count, least=1)
    seed = _integer(sampling, "seed", default=0, least=-(1 << 63)) if sampling.get("temperature") != 0 else 0
    key = xxh3_64_intdigest(prompt.tobytes(), seed & (1 << 64) - 1)
    ignore_eos = bool(stop.get("ignore_eos"))
    return _Answer(
        tokens=prompt,
        prompt_count=len(prompt),
        hashes=chain(local_hashes(prompt, settings.block_size)),
        text=phrasebook.tokens(key),
        natural_length=room_count if ignore_eos else phrasebook.length(key),
        min_tokens=_integer(stop, "min_tokens", default=0, least=0),
        max_tokens=min(max_tokens, room_count),
        stop_ids=_stop_ids(request, stop, ignore_eos=ignore_eos),
    )


def _prompt(request: Mapping[str, Any]) -> array[int]:
    token_ids = request.get("token_ids")
    try:
        prompt = array("I", token_ids if isinstance(token_ids, (list, tuple)) else ())
    except (TypeError, OverflowError) as exc:
        raise InvalidRequest(f"token_ids are not all token ids: {exc}") from exc
    if not prompt:
        raise InvalidRequest("token_ids must be a non-empty list of token ids")
    return prompt


def _mapping(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = request.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object, not {type(value).__name__}")
    return value


def _integer(options: Mapping[str, Any], name: str, *, default: int, least: int) -> int:
    value = options.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidRequest(f"{name}={value!r} must be a whole number of at least {least}")
    return value


def _stop_ids(request: Mapping[str, Any], stop: Mapping[str, Any], *, ignore_eos: bool) -> frozenset[int]:
    eos = [] if ignore_eos else request.get("eos_token_ids") or []
    try:
        return frozenset(eos) | frozenset(stop.get("stop_token_ids_hidden") or [])
    except TypeError as exc:
        raise InvalidRequest(f"stop token ids are not a list of token ids: {exc}") from exc
