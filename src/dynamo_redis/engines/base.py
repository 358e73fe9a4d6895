"""What an engine is to a worker: something that turns token ids into token ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.handlers import AnyHandler


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """KV blocks that the engine now holds. Hashes are the engine's own, one a block, in order.

    `parent_hash` is the block before the first, or None at the start of a sequence; `token_ids` are those of
    all the blocks, `block_size` tokens each.
    """

    block_hashes: tuple[int, ...]
    parent_hash: int | None
    token_ids: Sequence[int]
    block_size: int


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """KV blocks that the engine no longer holds."""

    block_hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """The engine emptied its KV cache."""


KvEvent = BlocksStored | BlocksRemoved | AllBlocksCleared

KvEventSink = Callable[[KvEvent], None]
"""Where an engine reports its KV cache; called on the event loop, in order, must not block or raise."""


def report_to(publisher: KvPublisher) -> KvEventSink:
    """A sink that has a publisher tell routers."""

    def report(event: KvEvent) -> None:
        match event:
            case BlocksStored(block_hashes, parent_hash, token_ids):
                publisher.stored(block_hashes, token_ids, parent_hash)
            case BlocksRemoved(block_hashes):
                publisher.removed(block_hashes)
            case AllBlocksCleared():
                publisher.cleared()

    return report


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """The sizes of the engine; they go into the model card, which follows when it changes. All but
    `data_parallel_size` and `context_length` are of one data-parallel rank. `context_length` is the engine's
    own limit of a prompt and its answer, or None if that is what the model's files say."""

    total_kv_blocks: int
    kv_block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    data_parallel_size: int = 1
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One step of an engine's rank: what it computed, how long that took, and who waited meanwhile.

    `number` counts the rank's steps from 1.
    """

    number: int
    prefill_request_count: int
    prefill_token_count: int
    decode_request_count: int
    duration_s: float
    waiting_request_count: int
    waiting_token_count: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What one data-parallel rank has to do now. `active_blocks` are those that running requests hold;
    `prefix_hit_rate` is the part of all prompt tokens that was found in the cache. Either is None if unknown:
    then routers go by what they have given the worker."""

    dp_rank: int
    running_count: int
    waiting_count: int
    active_blocks: int | None
    total_blocks: int
    prefix_hit_rate: float | None = None
    last_pass: ForwardPass | None = None


class Engine(Protocol):
    """A generation engine, of one or several data-parallel ranks. `capacity` and `generate` are all that one
    which derives from this class must have.

    `generate` is an async generator: it yields items as tokens are made, the last with a `finish_reason`,
    and ends early once the context is stopped. Closing the generator frees what the request holds.
    Raise `InvalidRequest` for what cannot be served and `Overloaded` when the engine's queue is full.
    """

    @property
    def capacity(self) -> EngineCapacity:
        """Asked after `start` only."""
        ...

    async def start(self) -> None:
        """Return when requests can be served; raise to end the worker. Here: at once."""

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        """From now on report each rank's KV cache to its publisher; `publishers` has one a rank, in order.

        Called once, after `start` and before callers can find the engine; not at all without KV events.
        Here: report nothing.
        """

    def generate(self, request: GenerateRequest, context: Context) -> AsyncIterator[GenerateItem]: ...

    async def clear_kv_blocks(self) -> int:
        """Drop cached blocks that no running request uses, on all ranks; answers how many. Here: none."""
        return 0

    def loads(self) -> Sequence[EngineLoad]:
        """The load of each rank, as last known; empty if nothing is. Cheap: asked several times a second.
        Here: nothing."""
        return ()

    async def wait_health(self, healthy: bool) -> None:
        """Return when the engine's health is that. While it is not healthy its instance is not registered.
        Here: it is always healthy."""
        if not healthy:
            await asyncio.Event().wait()

    def endpoints(self) -> Mapping[str, AnyHandler]:
        """Further endpoints to be served beside `generate`, by name. Here: none."""
        return {}

    async def aclose(self) -> None:
        """End. Called once, also after a `start` that has failed. Here: nothing."""
