"""What an engine is to a worker: something that turns token ids into token ids."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.llm_protocol import GenerateItem, GenerateRequest


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """KV blocks that the engine now holds. Hashes are the engine's own, one a block, in order.

    `parent_hash` is the block before the first, or None at the start of a sequence; `token_ids` are those of
    all the blocks, `block_size` tokens each.
    """

    block_hashes: tuple[int, ...]
    parent_hash: int | None
    token_ids: tuple[int, ...]
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


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What the engine can hold; goes into the model card as `runtime_config`."""

    total_kv_blocks: int
    kv_block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


class Engine(Protocol):
    """A generation engine.

    `generate` is an async generator: it yields items as tokens are made, the last with a `finish_reason`,
    and ends early once the context is stopped. Closing the generator frees what the request holds.
    Raise `InvalidRequest` for what cannot be served and `Overloaded` when the engine's queue is full.
    """

    @property
    def capacity(self) -> EngineCapacity: ...

    async def start(self) -> None: ...

    def generate(self, request: GenerateRequest, context: Context) -> AsyncIterator[GenerateItem]: ...

    async def clear_kv_blocks(self) -> int:
        """Drop cached blocks that no running request uses; answers how many."""
        ...

    async def aclose(self) -> None: ...
