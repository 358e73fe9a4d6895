"""The interface between a worker and its engine, which generates token ids from token ids."""

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
    """KV blocks that the engine has stored. Hashes are the engine's own, one a block, in order.

    `parent_hash` is of the block before the first; None at the start of a sequence. `token_ids` are of all
    these blocks, `block_size` tokens each.
    """

    block_hashes: tuple[int, ...]
    parent_hash: int | None
    token_ids: Sequence[int]
    block_size: int
    cache_salt: str | None = None
    """The salt of the requests that may share these blocks; None: those without one."""


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """KV blocks that the engine has removed."""

    block_hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """The engine has emptied its KV cache."""


KvEvent = BlocksStored | BlocksRemoved | AllBlocksCleared

KvEventSink = Callable[[KvEvent], None]
"""A receiver of an engine's KV events. Called on the event loop, in order; must not block or raise."""


def report_to(publisher: KvPublisher) -> KvEventSink:
    """Return a sink that publishes the events for routers."""

    def report(event: KvEvent) -> None:
        match event:
            case BlocksStored(block_hashes, parent_hash, token_ids, cache_salt=cache_salt):
                publisher.stored(block_hashes, token_ids, parent_hash, cache_salt=cache_salt)
            case BlocksRemoved(block_hashes):
                publisher.removed(block_hashes)
            case AllBlocksCleared():
                publisher.cleared()

    return report


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """The sizes of the engine, as in the model card, which is updated when they change.

    All but `data_parallel_size` and `context_length` are of one data-parallel rank. `context_length` is the
    engine's limit for a prompt and its answer together; None: as in the model's files. Other sizes that are
    None are not known.
    """

    total_kv_blocks: int | None
    kv_block_size: int
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    data_parallel_size: int = 1
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One step of an engine's rank: its work, its duration, and the requests that waited meanwhile.

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
    """The present load of one data-parallel rank.

    `active_blocks` is the number of blocks that running requests hold, `prefix_hit_rate` the part of all
    prompt tokens that was found in the cache. What is None is unknown; without `active_blocks` routers use
    their own count of the requests that they have sent to the worker.
    """

    dp_rank: int
    running_count: int
    waiting_count: int | None
    active_blocks: int | None
    total_blocks: int | None
    prefix_hit_rate: float | None = None
    last_pass: ForwardPass | None = None


class Engine(Protocol):
    """A generation engine, of one or several data-parallel ranks. A subclass has to define `capacity` and
    `generate`; the other methods have defaults.

    `generate` is an async generator. It yields items as tokens are made, the last one with a `finish_reason`,
    and ends early when the context is stopped. To close the generator frees the request's resources. It
    raises `InvalidRequest` for a request that cannot be served, and `Overloaded` when the engine's queue is
    full.
    """

    @property
    def capacity(self) -> EngineCapacity:
        """The sizes of the engine. Read after `start` only."""
        ...

    async def start(self) -> None:
        """Return when requests can be served; raise to end the worker. Default: return at once."""

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        """Report each rank's KV cache to its publisher from now on; `publishers` has one a rank, in order.

        Called once, after `start` and before callers can find the engine; not called without KV events.
        Default: report nothing.
        """

    def generate(self, request: GenerateRequest, context: Context) -> AsyncIterator[GenerateItem]: ...

    async def clear_kv_blocks(self) -> int:
        """Drop the cached blocks that no running request uses, on all ranks; return their number.

        Default: 0.
        """
        return 0

    def loads(self) -> Sequence[EngineLoad]:
        """Return the last known load of each rank; empty if it is unknown. Called several times a second.

        Default: empty.
        """
        return ()

    async def wait_health(self, healthy: bool) -> None:
        """Return when the engine is healthy, or when it is not. While it is not, its instance is
        unregistered.

        Default: always healthy.
        """
        if not healthy:
            await asyncio.Event().wait()

    def endpoints(self) -> Mapping[str, AnyHandler]:
        """Return the handlers of further endpoints to serve, by name. Default: none."""
        return {}

    async def aclose(self) -> None:
        """Close the engine. Called once, also after a `start` that has failed. Default: nothing."""
