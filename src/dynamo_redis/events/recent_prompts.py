"""The prompts that an engine was sent lately, by which the place of a stored block is found. Pure.

An engine reports the block behind which it stores new ones by a hash of its own. If that block was never
reported here, neither its tokens nor the blocks before it are known. But it is part of a prompt that the
engine was sent, and in that prompt the new blocks follow it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from dynamo_redis.events.block_hashes import chain, local_hashes

BLOCK_COUNT: Final = 1 << 15
"""Most blocks of prompts that are remembered; the last block of a prompt counts even if it is not full."""

MATCH_TOKENS_COUNT: Final = 16
"""Fewest tokens of a run that must equal those of a prompt: a single token is found in many places."""

CANDIDATES_COUNT: Final = 64
"""Most places of a block's content among which the right one is looked for."""


class Content(NamedTuple):
    """The content of a block, without its place: its local hash, and its tokens as bytes of an
    `array('I')`."""

    local: int
    tokens: bytes


class _Fit(NamedTuple):
    """The part of a run that equals a remembered prompt, at one place.

    `block_count` of its first blocks are equal; the blocks after them are an answer. `is_rest` is True if all
    blocks are equal and the last one is the last whole block of a prompt.
    """

    block_count: int
    is_rest: bool


class RecentPrompts:
    """Prompts by their blocks, in two halves: when the younger half is full the older one is dropped.

    `note` only copies the token ids. The first `find` hashes them: about 1 µs a block, 33 ms at most. Each
    later `find` hashes the prompts that have come since the one before.
    """

    def __init__(self, block_size: int, *, block_count: int = BLOCK_COUNT) -> None:
        self._block_size = block_size
        self._half_count = block_count // 2
        self._old, self._young = _Half(block_size), _Half(block_size)

    @property
    def block_count(self) -> int:
        """Number of blocks remembered; equal ones count each time that they came."""
        return self._old.block_count + self._young.block_count

    def note(self, token_ids: Sequence[int], seed: int) -> None:
        """Remember a prompt that the engine is about to get; no effect if it is no list of token ids."""
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
        """Return the sequence hashes of the blocks before a run of blocks, from the beginning of the sequence
        on, at least one; None if no place or several places are possible.

        A place is possible if the run's first block is there in a remembered prompt, and its further blocks
        equal a prompt's, up to a block in which the answer to a prompt may begin. Also possible is the end of
        a prompt whose last tokens begin the run's first block: then the run is the answer. If the run can be
        the rest of a prompt, up to its end, places at which it would be an answer do not count, because an
        answer does not go on with the user's next question. Answers to prompts that end with a whole block
        are not considered: any run could be one, and no place would be the only one.
        """
        for half in (self._old, self._young):
            half.hash_waiting()
        content = run[0].local
        places = {*self._old.places.get(content, ()), *self._young.places.get(content, ())}
        places |= self._ends_before(run[0], seed)
        if len(places) > CANDIDATES_COUNT:
            return None
        fits = {before: fit for before in places if (fit := self._fit(before, run, seed)) is not None}
        if any(fit.is_rest for fit in fits.values()):
            fits = {before: fit for before, fit in fits.items() if fit.block_count == len(run)}
        if len(fits) != 1:
            return None
        ((before, fit),) = fits.items()
        if fit.block_count * self._block_size < MATCH_TOKENS_COUNT:
            return None
        parents = self._young.parents if before in self._young.parents else self._old.parents
        lineage = [before]
        parent = parents[before]
        while parent is not None:
            lineage.append(parent)
            parent = parents[parent]
        lineage.reverse()
        return lineage

    def _ends_before(self, block: Content, seed: int) -> set[int]:
        """Return the last whole blocks of those prompts whose last tokens are the first ones of `block`."""
        found: set[int] = set()
        for end in range(array("I").itemsize, len(block.tokens), array("I").itemsize):
            for half in (self._old, self._young):
                found |= half.ends.get((seed, block.tokens[:end]), set())
        return found

    def _fit(self, before: int, run: Sequence[Content], seed: int) -> _Fit | None:
        """Compare a run with the prompts behind `before`; None if it cannot be there."""
        halves = (self._old, self._young)
        passed: list[int] = []
        name = before
        for block in run:
            passed.append(name)
            (name,) = chain((block.local,), name, seed=seed)
            if not any(name in half.parents for half in halves):
                # An answer has begun here or before, behind the last whole block of a prompt or within the
                # block that follows it; its first blocks may be equal to another prompt's.
                for last, following in zip(passed, run, strict=False):
                    is_end = any(last in half.ends.get((seed, b""), ()) for half in halves)
                    if is_end or last in self._ends_before(following, seed):
                        return _Fit(len(passed) - 1, is_rest=False)
                return None
        return _Fit(len(run), is_rest=any(name in half.lasts for half in halves))


class _Half:
    """Prompts that are forgotten together."""

    __slots__ = ("_block_size", "block_count", "ends", "lasts", "parents", "places", "waiting")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.block_count = 0
        self.waiting: list[tuple[array[int], int]] = []  # not yet hashed, with their seeds
        self.parents: dict[int, int | None] = {}  # sequence hash → that of the block before
        self.places: dict[int, tuple[int, ...]] = {}  # local hash → sequence hashes before it, each once
        self.lasts: set[int] = set()  # the last whole blocks of prompts
        self.ends: dict[tuple[int, bytes], set[int]] = {}  # seed, last tokens → the last whole blocks before

    def hash_waiting(self) -> None:
        """Enter the prompts that were noted since the last call."""
        for tokens, seed in self.waiting:
            local = local_hashes(tokens, self._block_size, seed=seed)
            name: int | None = None
            for block, following in zip(local, chain(local, seed=seed), strict=True):
                if following not in self.parents:
                    self.parents[following] = name
                    if name is not None:
                        known = self.places.get(block, ())
                        if len(known) <= CANDIDATES_COUNT:
                            self.places[block] = (*known, name)
                name = following
            if name is not None:
                rest = tokens[len(local) * self._block_size :].tobytes()
                self.ends.setdefault((seed, rest), set()).add(name)
                self.lasts.add(name)
        self.waiting.clear()
