"""The events and prompts of suite `index`: chats on many workers, as the blocks of their KV caches.

Every chat begins with one of a few system prompts, which every worker that serves one of its chats holds.
Each turn brings the blocks of a new message as one event, then the answer's blocks one by one, as engines
that decode do. Some turns go to another worker, which takes in the whole chat. A worker that is full evicts
the chat that it has not served for longest, from its end on, with one event a block, as engines do. Equal
seeds give equal chats in every process.

Standard library only: rivals import it in their own environments.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import md5
from typing import NamedTuple

SYSTEMS_COUNT = 8
SYSTEM_BLOCKS = 24
MESSAGE_BLOCKS = (8, 40)
ANSWER_BLOCKS = 8
NEW_CHATS = 0.5
MOVES = 0.05
DOCUMENT_READERS = 3

WORKERS = 64
CAPACITY_BLOCKS = 5000
SAID_BLOCKS = 600_000
PROMPTS = 256
PROMPT_BLOCKS = 64
DOCUMENTS = 32
DOCUMENT_BLOCKS = 2048


class Block(NamedTuple):
    """A block's own hash, and the hash of it together with all before it. Both are drawn at random instead of
    computed."""

    local: int
    sequence: int


class Event(NamedTuple):
    """Blocks that a worker stored behind `parent` (a sequence hash, None for none), or that it removed."""

    worker: int
    stored: bool
    parent: int | None
    blocks: list[Block]


class Scene(NamedTuple):
    """The input of both sides: events, prompts of chats, and long prompts with the workers that read them."""

    events: list[Event]
    prompts: list[list[Block]]
    documents: list[list[Block]]
    readings: list[Event]


@dataclass(slots=True)
class Chat:
    """The blocks of a chat, from the first on."""

    blocks: list[Block]
    system: int


@dataclass(slots=True)
class _Cache:
    """One worker's chats in the order in which they were served last, and its system prompts."""

    systems: set[int] = field(default_factory=set)
    chats: dict[int, int] = field(default_factory=dict)
    """The count of held blocks by the number of the chat."""
    count: int = 0


class Chats:
    """Chats on `workers` workers, each of which holds at most `capacity` blocks."""

    def __init__(self, seed: int, workers: int, capacity: int) -> None:
        self._rng = random.Random(seed)
        self._capacity = capacity
        self._caches = [_Cache() for _ in range(workers)]
        self.distinct_count = 0
        """Different blocks drawn so far."""
        self._systems = [self._fresh(SYSTEM_BLOCKS) for _ in range(SYSTEMS_COUNT)]
        self.chats: list[Chat] = []

    def events(self, blocks_count: int) -> Iterator[Event]:
        """Yield the events of turns of chats until they have stored and removed `blocks_count` blocks."""
        done = 0
        while done < blocks_count:
            for event in self._turn():
                done += len(event.blocks)
                yield event

    def events_until(self, distinct_count: int) -> Iterator[Event]:
        """Yield the events of turns of chats until they have stored `distinct_count` different blocks."""
        while self.distinct_count < distinct_count:
            yield from self._turn()

    def prompts(self, count: int, length: int) -> list[list[Block]]:
        """Return the next prompts of chats: their blocks so far, and new ones up to `length`."""
        return [(chat.blocks + self._fresh(length))[:length] for chat in self._rng.sample(self.chats, count)]

    def documents(self, count: int, length: int) -> Iterator[tuple[list[Block], list[Event]]]:
        """Yield long prompts, each with the events of some workers that read it up to different points."""
        for _ in range(count):
            blocks = self._systems[0] + self._fresh(length - SYSTEM_BLOCKS)
            readers = self._rng.sample(range(len(self._caches)), DOCUMENT_READERS)
            ends = [self._rng.randrange(SYSTEM_BLOCKS, length) for _ in readers]
            yield (
                blocks,
                [Event(worker, True, None, blocks[:end]) for worker, end in zip(readers, ends, strict=True)],
            )

    def _turn(self) -> Iterator[Event]:
        worker = self._rng.randrange(len(self._caches))
        cache = self._caches[worker]
        number = self._choose(cache)
        chat = self.chats[number]
        if chat.system not in cache.systems:
            cache.systems.add(chat.system)
            cache.count += SYSTEM_BLOCKS
            yield Event(worker, True, None, self._systems[chat.system])
        held = cache.chats.pop(number, SYSTEM_BLOCKS)
        chat.blocks = chat.blocks + self._fresh(self._rng.randint(*MESSAGE_BLOCKS))
        yield Event(worker, True, chat.blocks[held - 1].sequence, chat.blocks[held:])
        for block in self._fresh(ANSWER_BLOCKS):
            yield Event(worker, True, chat.blocks[-1].sequence, [block])
            chat.blocks.append(block)
        cache.chats[number] = len(chat.blocks)
        cache.count += len(chat.blocks) - held
        while cache.count > self._capacity and len(cache.chats) > 1:
            oldest = next(iter(cache.chats))
            end = cache.chats.pop(oldest)
            given_up = self.chats[oldest].blocks[SYSTEM_BLOCKS:end]
            cache.count -= len(given_up)
            for block in reversed(given_up):
                yield Event(worker, False, None, [block])

    def _choose(self, cache: _Cache) -> int:
        chance = self._rng.random()
        if cache.chats and chance > NEW_CHATS:
            return self._rng.choice(list(cache.chats))
        if self.chats and chance < MOVES:
            return self._rng.randrange(len(self.chats))
        system = self._rng.randrange(SYSTEMS_COUNT)
        self.chats.append(Chat(list(self._systems[system]), system))
        return len(self.chats) - 1

    def _fresh(self, count: int) -> list[Block]:
        draw = self._rng.getrandbits
        self.distinct_count += count
        return [Block(draw(64), draw(64)) for _ in range(count)]


def scene() -> Scene:
    """Return the scene. It is the same in every process."""
    chats = Chats(5, WORKERS, CAPACITY_BLOCKS)
    events = list(chats.events(SAID_BLOCKS))
    prompts = chats.prompts(PROMPTS, PROMPT_BLOCKS)
    documents = list(chats.documents(DOCUMENTS, DOCUMENT_BLOCKS))
    readings = [event for _, read in documents for event in read]
    return Scene(events, prompts, [blocks for blocks, _ in documents], readings)


def digest(scores: Iterable[dict[int, int]]) -> str:
    """Return a digest of the workers found and their blocks, prompt by prompt."""
    return md5(repr([sorted(found.items()) for found in scores]).encode()).hexdigest()
