"""The mock engine: it behaves as a GPU engine does, without a GPU.

It has continuous batching and a paged KV cache with prefix reuse, takes as long as a real engine would
(`batching.py` models both), reports its KV events, and answers in readable text, or as it is told
(`scripts.py`). The answer depends on the prompt and the seed alone, not on other requests. Options such as
temperature and penalties have no effect on it. An option whose violation would show in the answer is refused.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final

import anyio.to_thread

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.engines.base import EngineCapacity, EngineLoad, report_to
from dynamo_redis.engines.mock.kv_cache import BlockCache
from dynamo_redis.engines.mock.rank import MockRank
from dynamo_redis.engines.mock.request import read_request
from dynamo_redis.engines.mock.scripts import Scripts
from dynamo_redis.engines.model_tokens import load_tokenizer
from dynamo_redis.engines.text import Phrasebook
from dynamo_redis.errors import ConfigError, Draining, InvalidRequest
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.directory import ModelDirectory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.handlers import AnyHandler

_PIECE_BLOCK_COUNT: Final = 4096
"""Block hashes in one item of `kv_cache`."""


class MockEngine:
    """An `Engine` without a model. Each rank has its own cache, batch and step loop."""

    def __init__(self, settings: MockEngineSettings, model: ModelDirectory) -> None:
        """Make the ranks. Raises ConfigError if the settings contradict each other."""
        if settings.max_num_batched_tokens < settings.max_num_seqs:
            raise ConfigError(
                f"DYN_MOCK_MAX_NUM_BATCHED_TOKENS={settings.max_num_batched_tokens} must be at least "
                f"DYN_MOCK_MAX_NUM_SEQS={settings.max_num_seqs}: each running request takes a token a step"
            )
        self.ranks = tuple(MockRank(settings, dp_rank) for dp_rank in range(settings.data_parallel_size))
        self._settings = settings
        self._model = model
        self._phrasebook: Phrasebook | None = None
        self._scripts: Scripts | None = None

    def __repr__(self) -> str:
        caches = ", ".join(repr(rank.cache) for rank in self.ranks)
        return f"<MockEngine {self.running_count} running, {self.waiting_count} waiting, {caches}>"

    @property
    def capacity(self) -> EngineCapacity:
        return EngineCapacity(
            total_kv_blocks=self._settings.total_kv_blocks,
            kv_block_size=self._settings.block_size,
            max_num_seqs=self._settings.max_num_seqs,
            max_num_batched_tokens=self._settings.max_num_batched_tokens,
            data_parallel_size=len(self.ranks),
        )

    @property
    def cache(self) -> BlockCache:
        """The first rank's KV cache."""
        return self.ranks[0].cache

    @property
    def running_count(self) -> int:
        """The number of requests that are being answered."""
        return sum(rank.batch.running_count for rank in self.ranks)

    @property
    def waiting_count(self) -> int:
        """The number of requests that wait to be admitted."""
        return sum(rank.batch.waiting_count for rank in self.ranks)

    async def start(self) -> None:
        """Load the tokenizer and start the step loops. Raises ModelError."""
        tokenizer = await anyio.to_thread.run_sync(load_tokenizer, self._model)
        self._phrasebook = await anyio.to_thread.run_sync(Phrasebook, tokenizer)
        self._scripts = Scripts(tokenizer)
        for rank in self.ranks:
            rank.start()

    async def aclose(self) -> None:
        """End the step loops; requests under way end with Draining. Idempotent."""
        for rank in self.ranks:
            await rank.aclose()

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        for rank, publisher in zip(self.ranks, publishers, strict=True):
            rank.cache.events = report_to(publisher)

    async def clear_kv_blocks(self) -> int:
        return sum(rank.cache.clear() for rank in self.ranks)

    def loads(self) -> Sequence[EngineLoad]:
        return [rank.load() for rank in self.ranks]

    async def wait_health(self, healthy: bool) -> None:
        """See `Engine`. The engine is healthy from the start until a step loop fails, and never again."""
        steps = [rank.steps for rank in self.ranks if rank.steps is not None]
        if not healthy:
            await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
        elif not all(rank.running for rank in self.ranks):
            await asyncio.get_running_loop().create_future()

    def endpoints(self) -> Mapping[str, AnyHandler]:
        """Return with `serve_cache` the endpoint `kv_cache`: the true contents of the caches, to check
        routers.

        For each rank it yields {"dp_rank", "block_count"}, then {"hashes": …} with u64, little-endian.
        """

        async def kv_cache(_: object) -> AsyncGenerator[dict[str, Any], None]:
            for rank in self.ranks:
                blocks = array("Q", rank.cache.stored())
                if sys.byteorder == "big":
                    blocks.byteswap()
                yield {"dp_rank": rank.dp_rank, "block_count": len(blocks)}
                for first in range(0, len(blocks), _PIECE_BLOCK_COUNT):
                    yield {"hashes": blocks[first : first + _PIECE_BLOCK_COUNT].tobytes()}

        return {"kv_cache": kv_cache} if self._settings.serve_cache else {}

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Answer token by token, as `Engine` describes.

        A prompt that fills the model's context, or the whole KV cache, raises InvalidRequest. An answer that
        fills either ends with `length`. A stopped request ends with an item `cancelled`.
        """
        if self._phrasebook is None or self._scripts is None:
            raise Draining("the engine is not running")
        sequence = read_request(
            request, self._phrasebook, self._scripts, self._settings, self._model.context_length
        )
        wanted: object = request.get("dp_rank")
        if wanted is None:
            rank = min(self.ranks, key=lambda each: each.request_count)
        elif isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(self.ranks):
            rank = self.ranks[wanted]
        else:
            raise InvalidRequest(f"dp_rank={wanted!r} must be one of 0 to {len(self.ranks) - 1}")
        rank.submit(sequence)
        unsubscribe = context.on_cancel(lambda _: rank.cancel(sequence))
        loop = asyncio.get_running_loop()  # a system call, on Python 3.11
        try:
            while True:
                while sequence.ready:
                    item = sequence.ready.popleft()
                    yield item
                    if "finish_reason" in item:
                        return
                if sequence.ended is not None:
                    raise sequence.ended
                sequence.waiter = loop.create_future()
                await sequence.waiter
        finally:
            unsubscribe()
            rank.batch.remove(sequence)
