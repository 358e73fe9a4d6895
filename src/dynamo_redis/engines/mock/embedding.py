"""The mock engine for embeddings: vectors of length 1 that depend on the input's tokens alone."""

from __future__ import annotations

import asyncio
import math
import random
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, cast

import anyio.to_thread
from xxhash import xxh3_64_intdigest

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import Engine, EngineCapacity, EngineLoad
from dynamo_redis.engines.embedding_request import BATCH_COUNT, input_ids, wanted_dimensions, wants_base64
from dynamo_redis.errors import InvalidRequest, Overloaded
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.directory import ModelDirectory
from dynamo_redis.models.llm_protocol import EmbeddingItem, GenerateItem, GenerateRequest
from dynamo_redis.models.vectors import pack
from dynamo_redis.planes.context import Context


class MockEmbeddingEngine(Engine):
    """An `Engine` that makes embeddings without a model.

    An input takes the time of its tokens (`DYN_MOCK_PREFILL_TOKEN_S`). Shorter vectors are the beginning of
    the model's own, scaled to length 1. It has no KV cache.
    """

    def __init__(self, settings: MockEngineSettings, model: ModelDirectory) -> None:
        self._settings = settings
        self._model = model
        self._running_count = 0

    def __repr__(self) -> str:
        return f"<MockEmbeddingEngine {self._running_count} running>"

    @property
    def capacity(self) -> EngineCapacity:
        return EngineCapacity(
            total_kv_blocks=None,
            kv_block_size=self._settings.block_size,
            max_num_seqs=self._settings.max_num_seqs,
            max_num_batched_tokens=self._settings.max_num_batched_tokens,
        )

    async def start(self) -> None:
        """Return at once: there is nothing to load."""

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        """Report nothing: there is no KV cache."""

    async def aclose(self) -> None:
        """Close nothing. Requests under way go on until they are closed."""

    def loads(self) -> Sequence[EngineLoad]:
        return [EngineLoad(0, self._running_count, 0, None, None)]

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Yield the vectors of each `BATCH_COUNT` inputs, as `EmbeddingItem`s. Ends early when the context is
        stopped. Raises InvalidRequest, and Overloaded over `max_num_seqs` and `max_num_waiting`."""
        inputs = input_ids(request)
        self._check(inputs, wanted_dimensions(request))
        if self._running_count >= self._settings.max_num_seqs + self._settings.max_num_waiting:
            raise Overloaded("the engine has as many requests as it may")
        self._running_count += 1
        try:
            for start in range(0, len(inputs), BATCH_COUNT):
                batch = inputs[start : start + BATCH_COUNT]
                if self._settings.speedup_ratio:
                    reading_s = self._settings.prefill_token_s * sum(map(len, batch))
                    await asyncio.sleep(reading_s / self._settings.speedup_ratio)
                if context.is_stopped():
                    return
                item = await anyio.to_thread.run_sync(self._embed, batch, request)
                yield cast("GenerateItem", item)
        finally:
            self._running_count -= 1

    def _check(self, inputs: Sequence[Sequence[int]], dimensions: int | None) -> None:
        """Raise InvalidRequest for an input over the context, or more dimensions than there are."""
        longest, most = max(map(len, inputs)), self._settings.embedding_dimensions
        if longest > self._model.context_length:
            raise InvalidRequest(f"an input has {longest} tokens, the context {self._model.context_length}")
        if dimensions is not None and dimensions > most:
            raise InvalidRequest(f"dimensions: the model's embeddings have {most} numbers, not {dimensions}")

    def _embed(self, inputs: Sequence[Sequence[int]], request: Mapping[str, Any]) -> EmbeddingItem:
        length = wanted_dimensions(request) or self._settings.embedding_dimensions
        vectors = [unit_vector(token_ids, length) for token_ids in inputs]
        count = sum(map(len, inputs))
        return EmbeddingItem(
            embeddings=[pack(vector) for vector in vectors] if wants_base64(request) else list(vectors),
            prompt_tokens=count,
            total_tokens=count,
        )


def unit_vector(token_ids: Sequence[int], length: int) -> list[float]:
    """Return the vector of an input. Raises InvalidRequest for numbers that are no token ids."""
    try:
        seed = xxh3_64_intdigest(array("I", token_ids).tobytes())
    except (TypeError, OverflowError) as exc:
        raise InvalidRequest(f"token_ids are not all token ids: {exc}") from exc
    rng = random.Random(seed)  # noqa: S311 - a test engine's vectors
    numbers = [rng.uniform(-1.0, 1.0) for _ in range(length)]
    norm = math.hypot(*numbers) or 1.0
    return [number / norm for number in numbers]
