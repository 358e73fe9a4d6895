"""The prompts that an engine was sent lately: they say what stands before blocks that it stores. Pure.

An engine names the block behind which it stores new ones by a hash of its own. Who has not heard of that
block knows neither its tokens nor what precedes it; but it belongs to a prompt that the engine was sent, and
in that prompt the new blocks follow.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import repeat
from typing import Final, NamedTuple

from dynamo_redis.events.block_hashes import chain, local_hashes

BLOCK_COUNT: Final = 1 << 15
"""Blocks of prompts that are remembered; the last of a prompt counts even if it is not full."""

MATCH_TOKENS_COUNT: Final = 16
"""So many tokens at least must be those of a prompt: a single token stands in many places."""

CANDIDATES_COUNT: Final = 64
"""Content that stands in more places than that says nothing."""


class Content(NamedTuple):
    """A block without what stands before it: its local hash, and its tokens as bytes of an `array('I')`."""

    local: int
    tokens: bytes


class _Fit(NamedTuple):
    """So many blocks of a run are as in prompts; whether they are all, and end one."""

    block_count: int
    is_rest: bool


class RecentPrompts:
    """Prompts by their blocks, in two halves: when the younger is full the older is forgotten, at once.

    Noting copies the token ids and no more. They are hashed when something is first looked for: about 1 µs a
    block, 33 ms at most, once; from then on with each search, what has come since.
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

        A run may stand where its first block does in a prompt, if it is as in prompts from there on, up to
        where an answer to one may have begun. It may also be the answer to a prompt that ends within its
        first block. If it may be the rest of a prompt, to the end, it is no answer, since answers do not ask
        the next question. None if there is no place, or more than one. Answers to prompts that end with a
        whole block are not thought of: they could be anything, and forbid everything.
        """
        for half in (self._old, self._young):
            half.hash_waiting()
        places = self._places(run[0]) | self._ends_before(run[0], seed)
        if len(places) > CANDIDATES_COUNT:
            return None
        fits = {before: fit for before in places if (fit := self._fit(before, run, seed)) is not None}
        if any(fit.is_rest for fit in fits.values()):
            fits = {before: fit for before, fit in fits.items() if fit.block_count == len(run)}
        if len(fits) != 1:
            return None
        ((before, fit),) = fits.items()
        return self._lineage(before) if fit.block_count * self._block_size >= MATCH_TOKENS_COUNT else None

    def _places(self, block: Content) -> set[int]:
        return set(self._old.places.get(block.local, ())) | set(self._young.places.get(block.local, ()))

    def _ends_before(self, block: Content, seed: int) -> set[int]:
        """Prompts' last whole blocks, where what is left of the prompt begins that block."""
        found: set[int] = set()
        for end in range(array("I").itemsize, len(block.tokens), array("I").itemsize):
            for half in (self._old, self._young):
                found |= half.ends.get((seed, block.tokens[:end]), set())
        return found

    def _fit(self, before: int, run: Sequence[Content], seed: int) -> _Fit | None:
        """How the run goes with prompts behind `before`; None if it cannot stand there."""
        halves = (self._old, self._young)
        passed: list[int] = []
        name = before
        for block in run:
            passed.append(name)
            (name,) = chain((block.local,), name, seed=seed)
            if not any(name in half.parents for half in halves):
                # Then an answer has begun, here or before: it may have gone along with another prompt.
                if any(map(self._may_end, passed, run, repeat(seed))):
                    return _Fit(len(passed) - 1, is_rest=False)
                return None
        return _Fit(len(run), is_rest=any(name in half.lasts for half in halves))

    def _may_end(self, name: int, following: Content, seed: int) -> bool:
        """Whether a prompt ends with that block, or within the next."""
        halves = (self._old, self._young)
        return any(name in half.ends.get((seed, b""), ()) for half in halves) or (
            name in self._ends_before(following, seed)
        )

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

    __slots__ = ("_block_size", "block_count", "ends", "lasts", "parents", "places", "waiting")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.block_count = 0
        self.waiting: list[tuple[array[int], int]] = []  # not yet hashed, with their seeds
        self.parents: dict[int, int | None] = {}  # sequence hash → the one before
        self.places: dict[int, tuple[int, ...]] = {}  # local hash → sequence hashes before it, each once
        self.lasts: set[int] = set()  # the last whole blocks of prompts
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
                self.lasts.add(name)
        self.waiting.clear()

    def _enter(self, block: int, before: int) -> None:
        known = self.places.get(block, ())
        if len(known) <= CANDIDATES_COUNT:
            self.places[block] = (*known, before)
