"""The prompts that an engine was sent lately: they say what stands before blocks that it stores. Pure.

An engine names the block behind which it stores new ones by a hash of its own. Who has not heard of that
block knows neither its tokens nor what precedes it; but it belongs to a prompt that the engine was sent, and
in that prompt the new blocks follow.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from dynamo_redis.router.hashing import chain, local_hashes

BLOCK_COUNT: Final = 1 << 16
"""Blocks of prompts that are remembered; the last of a prompt counts even if it is not full."""

MATCH_TOKENS_COUNT: Final = 16
"""So many tokens at least must be those of a prompt: a single token stands in many places."""

CANDIDATES_COUNT: Final = 64
"""Content that stands in more places than that says nothing."""


class Content(NamedTuple):
    """A block without what stands before it: its local hash, and its tokens as bytes of an `array('I')`."""

    local: int
    tokens: bytes


class RecentPrompts:
    """Prompts by their blocks, in two halves: when the younger is full the older is forgotten, at once.

    Noting copies the token ids and no more. They are hashed when something is first looked for: about 1 µs a
    block, 65 ms at most, once; from then on with each search, what has come since.
    """

    def __init__(self, block_size: int, *, block_count: int = BLOCK_COUNT) -> None:
        self._block_size = block_size
        self._half_count = block_count // 2
        self._old, self._young = _Half(block_size), _Half(block_size)

    @property
    def block_count(self) -> int:
        """Those remembered, equal ones each time that they came."""
        return self._old.block_count + self._young.block_count

    def note(self, token_ids: Sequence[int], seed: int) -> None:
        """The engine is about to be sent this prompt. What is no list of tokens is not remembered."""
        if len(token_ids) < self._block_size:
            return
        try:
            tokens = array("I", token_ids)
        except (TypeError, ValueError, OverflowError):
            return
        count = -(-len(tokens) // self._block_size)
        if self._young.block_count + count > self._half_count:
            self._old, self._young = self._young, _Half(self._block_size)
        self._young.waiting.append((tokens, seed))
        self._young.block_count += count

    def find(self, run: Sequence[Content], seed: int) -> list[int] | None:
        """The blocks before this run, from the beginning of the sequence, as sequence hashes; at least one.

        Every prompt in which the first of the run stands must say the same; as far as a prompt goes the whole
        run must be as in it, and at its end it may go on into an answer. None if no prompt says anything, or
        two say different things: also if the run may just as well be the answer to another prompt, one that
        ends within a block.
        """
        for half in (self._old, self._young):
            half.hash_waiting()
        places = self._places(run[0])
        ends = self._ends_before(run[0], seed)
        if not places or len(places | ends) > CANDIDATES_COUNT:
            return None
        fitting = [
            (before, count)
            for before in places | ends
            if (count := self._fitting_count(before, run, seed)) is not None
        ]
        if len(fitting) != 1 or fitting[0][1] * self._block_size < MATCH_TOKENS_COUNT:
            return None
        return self._lineage(fitting[0][0])

    def _places(self, block: Content) -> set[int]:
        return set(self._old.places.get(block.local, ())) | set(self._young.places.get(block.local, ()))

    def _ends_before(self, block: Content, seed: int) -> set[int]:
        """Prompts' last whole blocks, where what is left of the prompt begins that block."""
        found: set[int] = set()
        for end in range(array("I").itemsize, len(block.tokens), array("I").itemsize):
            for half in (self._old, self._young):
                found |= half.ends.get((seed, block.tokens[:end]), set())
        return found

    def _fitting_count(self, before: int, run: Sequence[Content], seed: int) -> int | None:
        """How many blocks of the run are those of prompts behind `before`; None if it cannot stand there."""
        name = before
        for count, block in enumerate(run):
            (following,) = chain((block.local,), name, seed=seed)
            if following not in self._old.parents and following not in self._young.parents:
                answers = name in self._ends_before(block, seed) or any(
                    name in half.ends.get((seed, b""), ()) for half in (self._old, self._young)
                )
                return count if answers else None
            name = following
        return len(run)

    def _lineage(self, name: int) -> list[int]:
        parents = self._young.parents if name in self._young.parents else self._old.parents
        lineage = [name]
        parent = parents[name]
        while parent is not None:
            lineage.append(parent)
            parent = parents[parent]
        lineage.reverse()
        return lineage


class _Half:
    """Prompts that are forgotten together."""

    __slots__ = ("_block_size", "block_count", "ends", "parents", "places", "waiting")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.block_count = 0
        self.waiting: list[tuple[array[int], int]] = []  # not yet hashed, with their seeds
        self.parents: dict[int, int | None] = {}  # sequence hash → the one before
        self.places: dict[int, tuple[int, ...]] = {}  # local hash → sequence hashes before it, each once
        self.ends: dict[tuple[int, bytes], set[int]] = {}  # what is left of prompts → their last whole blocks

    def hash_waiting(self) -> None:
        """Enter what was noted since."""
        for tokens, seed in self.waiting:
            local = local_hashes(tokens, self._block_size, seed=seed)
            name: int | None = None
            for block, following in zip(local, chain(local, seed=seed), strict=True):
                if following not in self.parents:
                    self.parents[following] = name
                    if name is not None:
                        self._enter(block, name)
                name = following
            if name is not None:
                rest = tokens[len(local) * self._block_size :].tobytes()
                self.ends.setdefault((seed, rest), set()).add(name)
        self.waiting.clear()

    def _enter(self, block: int, before: int) -> None:
        known = self.places.get(block, ())
        if len(known) <= CANDIDATES_COUNT:
            self.places[block] = (*known, before)
