"""An engine that computes nothing: it reports the blocks and the load that chats would cause."""

from __future__ import annotations

import random
from array import array
from collections.abc import AsyncIterator, Sequence
from typing import Final

from dynamo_redis.engines.base import Engine, EngineCapacity, EngineLoad
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context

BLOCK_TOKENS: Final = 16
PROMPT_BLOCKS: Final = 32
REPEATED_BLOCKS: Final = 12
"""Blocks of a prompt that its worker holds: 36 % of all, since one chat of 25 begins anew."""
NEW_EACH: Final = 25
ANSWER_TOKENS: Final = 200
ANSWER_BLOCKS: Final = ANSWER_TOKENS // BLOCK_TOKENS
TOKENS_PER_S: Final = 50.0
BLOCK_S: Final = BLOCK_TOKENS / TOKENS_PER_S
TOTAL_BLOCKS: Final = 20_000

_VOCABULARY: Final = 1 << 17
_WORDS: Final = array("I", random.Random(1).choices(range(_VOCABULARY), k=1 << 16))


class Chat:
    """A chat under way: its prompt is read, and `left` blocks of its answer are still to come."""

    __slots__ = ("last", "left", "tokens_from")

    def __init__(self, last: int, tokens_from: int) -> None:
        self.last = last
        self.left = ANSWER_BLOCKS
        self.tokens_from = tokens_from


class SimulatedEngine(Engine):
    """The KV cache and the load of a worker, by chats that `begin` and `go_on` with."""

    def __init__(self, number: int) -> None:
        self._rng = random.Random(number)
        self._names = number << 32
        self._chat_count = 0
        self._running_count = 0
        self._held_count = 0
        self._shared: Sequence[int] = ()
        self._shared_from = 0
        self.rank: KvPublisher
        """Valid once the worker follows the engine."""

    @property
    def capacity(self) -> EngineCapacity:
        return EngineCapacity(
            total_kv_blocks=TOTAL_BLOCKS,
            kv_block_size=BLOCK_TOKENS,
            max_num_seqs=256,
            max_num_batched_tokens=8192,
        )

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        (self.rank,) = publishers

    async def start(self) -> None:
        """It has nothing to load."""

    async def aclose(self) -> None:
        """It holds nothing."""

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncIterator[GenerateItem]:
        """Answer with one token: nobody asks."""
        yield {"token_ids": [0], "finish_reason": "stop"}

    def loads(self) -> Sequence[EngineLoad]:
        return (EngineLoad(0, self._running_count, 0, min(self._held_count, TOTAL_BLOCKS), TOTAL_BLOCKS),)

    def begin(self) -> Chat:
        """Report the blocks of a new prompt. 24 of 25 begin with blocks that the worker holds."""
        place = self._rng.randrange(len(_WORDS) - BLOCK_TOKENS * (PROMPT_BLOCKS + ANSWER_BLOCKS))
        names = self._new_names(PROMPT_BLOCKS)
        if self._chat_count % NEW_EACH == 0:
            self._shared, self._shared_from = names[:REPEATED_BLOCKS], place
            repeated_tokens = 0
        else:
            names[:REPEATED_BLOCKS] = self._shared
            repeated_tokens = REPEATED_BLOCKS * BLOCK_TOKENS
        tokens = (
            _WORDS[self._shared_from : self._shared_from + repeated_tokens]
            + _WORDS[place + repeated_tokens : place + PROMPT_BLOCKS * BLOCK_TOKENS]
        )
        self.rank.stored(names, tokens, None)
        self._chat_count += 1
        self._running_count += 1
        self._held_count += PROMPT_BLOCKS - repeated_tokens // BLOCK_TOKENS
        return Chat(names[-1], place + PROMPT_BLOCKS * BLOCK_TOKENS)

    def go_on(self, chat: Chat) -> bool:
        """Report the next block of a chat's answer. Return whether more follow."""
        (name,) = self._new_names(1)
        self.rank.stored([name], _WORDS[chat.tokens_from : chat.tokens_from + BLOCK_TOKENS], chat.last)
        chat.last = name
        chat.tokens_from += BLOCK_TOKENS
        chat.left -= 1
        self._held_count += 1
        if not chat.left:
            self._running_count -= 1
        return chat.left > 0

    def _new_names(self, count: int) -> list[int]:
        first = self._names
        self._names += count
        return list(range(first, first + count))
