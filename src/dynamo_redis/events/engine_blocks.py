"""What one rank of an engine holds in its KV cache, in the engine's names and in the router's. Pure.

An engine names blocks as it likes (numbers, digests); routers know sequence hashes. The same block may be
held several times: on several tiers, or under different engine hashes. It counts as held on a tier from its
first engine hash there to its last.

One engine hash may be reported several times: as present, each time that a request finds it (vLLM's full
reports), or for each copy, where two requests computed it at once. Nothing tells the two apart, so a report
again is no further copy, and the first removal ends it. Where a copy is left after that, some block will be
stored behind it: then it is held after all (`revive`).

Of some blocks the engine's name is not known, only that it must hold them, since it holds what follows them:
they are *inferred*. Of others only the engine's name is known, and what they contain, but not what stands
before them: they are *loose*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

from dynamo_redis.events.recent_prompts import Content
from dynamo_redis.wire.kv_event import TIERS

EngineHash = int | bytes
"""How an engine names a block. Integers count modulo 2^64: -1 and 2^64 - 1 are the same."""

_U64: Final = (1 << 64) - 1

_Key = TypeVar("_Key", int, EngineHash)


def engine_keys(hashes: Sequence[EngineHash]) -> list[EngineHash]:
    """Engine hashes in the one form in which they are compared."""
    return [h & _U64 if isinstance(h, int) else h for h in hashes]


class Block(NamedTuple):
    """A block by its sequence hash, and that of the block before it (None: it begins the sequence)."""

    name: int
    parent: int | None


class LocalIndex:
    """The blocks of one rank, tier by tier. Some 0.25 KB a block."""

    __slots__ = ("_tiers",)

    def __init__(self) -> None:
        self._tiers = tuple(TierIndex() for _ in TIERS)

    def __getitem__(self, tier: int) -> TierIndex:
        return self._tiers[tier]

    def name(self, key: EngineHash) -> int | None:
        """The sequence hash of a block that is held on any tier."""
        for tier in self._tiers:
            if (name := tier.held.get(key)) is not None:
                return name
        return None

    def block(self, key: EngineHash) -> Block | None:
        """A block that is held on any tier."""
        for tier in self._tiers:
            if (name := tier.held.get(key)) is not None:
                return Block(name, tier.blocks[name])
        return None

    def clear(self) -> None:
        """Nothing is held any more."""
        self._tiers = tuple(TierIndex() for _ in TIERS)


class TierIndex:
    """The blocks of one tier. To be changed by `store`, `infer` and `remove` alone."""

    __slots__ = (
        "_before_doubtful",
        "_followers",
        "_inferred",
        "_more_copies",
        "_reported_again",
        "blocks",
        "conflict_count",
        "doubtful",
        "held",
        "holes",
    )

    def __init__(self) -> None:
        self.held: dict[EngineHash, int] = {}  # engine hash → sequence hash
        self.blocks: dict[int, int | None] = {}  # sequence hash → the one before, in order of arrival
        self.holes: set[int] = set()  # what is not held, although something that follows it is
        self.doubtful: dict[int, int | None] = {}
        """Blocks that were reported again before they were removed, and that something doubtful or held
        follows: each with the block before it."""
        self.conflict_count = 0
        self._followers: dict[int, int] = {}  # sequence hash, held or not → blocks held right behind it
        self._inferred: set[int] = set()  # those of `blocks` that are held under no known engine hash
        self._reported_again: set[EngineHash] = set()  # those of `held` that were stored more than once
        self._before_doubtful: dict[int, int] = {}  # what precedes doubtful ones → how many of them
        self._more_copies: dict[int, int] = {}  # further engine hashes that hold the same block

    def store(
        self, keys: Sequence[EngineHash], names: Sequence[int], parents: Sequence[int | None]
    ) -> list[int]:
        """Each block is held. Answers those that were not, in order.

        A key that is held under another name is left as it is, and counted in `conflict_count`.
        """
        held, blocks, followers, holes = self.held, self.blocks, self._followers, self.holes
        new: list[int] = []
        for key, name, parent in zip(keys, names, parents, strict=True):
            if key in held:
                if held[key] == name:
                    self._reported_again.add(key)
                else:
                    self.conflict_count += 1
                continue
            held[key] = name
            if name in blocks:
                if self._inferred and name in self._inferred:
                    self._inferred.discard(name)  # now it has a name, and ends with that
                else:
                    self._more_copies[name] = self._more_copies.get(name, 0) + 1
                continue
            blocks[name] = parent
            new.append(name)
            if holes:
                self._fill(name)
            if parent is not None:
                followers[parent] = followers.get(parent, 0) + 1
                if parent not in blocks:
                    holes.add(parent)
        return new

    def infer(self, lineage: Sequence[int]) -> list[int]:
        """Blocks from the beginning of a sequence on are held, since one that follows them is, or is about to
        be stored. Each stays until the last that follows it is gone, or `store` gives it an engine hash.
        Answers those that were not held, in order.
        """
        new: list[int] = []
        parent: int | None = None
        for name in lineage:
            if name not in self.blocks:
                self.blocks[name] = parent
                self._inferred.add(name)
                self._fill(name)
                if parent is not None:
                    self._followers[parent] = self._followers.get(parent, 0) + 1
                new.append(name)
            parent = name
        return new

    def revive(self, name: int | None) -> list[int]:
        """A block is stored behind that one: of what precedes it, the doubtful blocks are held after all, as
        inferred ones. Answers them, from the beginning on. O(blocks before) while any block is doubtful."""
        revived: list[int] = []
        while self.doubtful and name is not None:
            if name in self.blocks:
                name = self.blocks[name]
            elif name in self.doubtful:
                revived.append(name)
                self.blocks[name] = parent = self.doubtful[name]
                self._inferred.add(name)
                self._fill(name)
                if parent is not None:
                    self._followers[parent] = self._followers.get(parent, 0) + 1
                    if parent not in self.blocks:
                        self.holes.add(parent)
                name = parent
            else:
                break
        revived.reverse()
        return revived

    def _fill(self, name: int) -> None:
        """A block is held now: it is no hole."""
        self.holes.discard(name)
        if name in self.doubtful:
            self._end_doubt(name)

    def _end_doubt(self, name: int) -> int | None:
        """A doubtful block is so no longer. Answers the block before it."""
        before = self.doubtful.pop(name)
        if before is not None:
            _take_one(self._before_doubtful, before)
        return before

    def _lose_followers(self, name: int) -> None:
        """Nothing that follows a block is held any more: whether it is there itself will not be known."""
        self.holes.discard(name)
        before: int | None = name
        while (
            before in self.doubtful and before not in self._followers and before not in self._before_doubtful
        ):
            before = self._end_doubt(before)

    def _doubt(self, removed: dict[int, int | None]) -> None:
        """Keep those of the removed blocks of which a copy may be left, as far as a held one needs them."""
        for block in removed:
            name: int | None = block
            while name in removed and name not in self.doubtful:
                if name not in self._followers and name not in self._before_doubtful:
                    break
                before = removed[name]
                self.doubtful[name] = before
                if before is not None:
                    self._before_doubtful[before] = self._before_doubtful.get(before, 0) + 1
                name = before

    def remove(self, keys: Sequence[EngineHash]) -> tuple[list[int], list[int]]:
        """These engine hashes hold their blocks no longer. Answers what is held no more: blocks that nothing
        follows here now, and blocks that something still does."""
        held, blocks, followers, holes = self.held, self.blocks, self._followers, self.holes
        gone: list[int] = []
        doubtful: dict[int, int | None] = {}
        for key in keys:
            name = held.get(key)
            if name is None:
                continue
            del held[key]
            is_doubtful = key in self._reported_again
            self._reported_again.discard(key)
            if self._more_copies and _take_one(self._more_copies, name):
                continue
            while True:
                parent = blocks.pop(name)
                gone.append(name)
                if is_doubtful:
                    doubtful[name] = parent
                    is_doubtful = False  # those inferred from it were not reported at all
                if parent is None:
                    break
                left_count = followers[parent] - 1
                if left_count:
                    followers[parent] = left_count
                    break
                del followers[parent]
                self._lose_followers(parent)
                if parent not in self._inferred:
                    break
                self._inferred.discard(parent)
                name = parent  # it was inferred from this one
        if doubtful:
            self._doubt(doubtful)
        inside = [name for name in gone if name in followers]
        if not inside:
            return gone, inside
        holes.update(inside)
        return [name for name in gone if name not in followers], inside


class LooseBlock(NamedTuple):
    """A block whose place is not known: the engine's name of the one before it, and what it contains."""

    before: EngineHash
    content: Content


class LooseBlocks:
    """Blocks of the device that have no sequence hash yet, and, *nameless*, those that never will. Past
    `max_count` of either the oldest are forgotten."""

    def __init__(self, max_count: int) -> None:
        self._max_count = max_count
        self._blocks: dict[EngineHash, LooseBlock] = {}
        self._nameless: dict[EngineHash, None] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._blocks) + len(self._nameless)

    def add(self, keys: Sequence[EngineHash], before: EngineHash, contents: Sequence[Content]) -> None:
        """Blocks that follow each other, the first of them `before`."""
        for key, content in zip(keys, contents, strict=True):
            self._blocks[key] = LooseBlock(before, content)
            before = key
        while len(self._blocks) > self._max_count:
            del self._blocks[next(iter(self._blocks))]

    def add_nameless(self, keys: Sequence[EngineHash]) -> None:
        """Blocks whose tokens do not say what they contain, or do not say it of one before them."""
        self._nameless.update(dict.fromkeys(keys))
        while len(self._nameless) > self._max_count:
            del self._nameless[next(iter(self._nameless))]

    def is_nameless(self, key: EngineHash) -> bool:
        """Whether nothing behind that block can be told."""
        return key in self._nameless

    def drop(self, keys: Sequence[EngineHash]) -> None:
        """They are held no longer, or have a place now."""
        for key in keys:
            self._blocks.pop(key, None)
            self._nameless.pop(key, None)

    def run_to(self, key: EngineHash, max_count: int) -> list[tuple[EngineHash, LooseBlock]]:
        """The loose blocks that follow each other up to that one, if it is loose; at most so many."""
        run: list[tuple[EngineHash, LooseBlock]] = []
        while len(run) < max_count and (block := self._blocks.get(key)) is not None:
            run.append((key, block))
            key = block.before
        run.reverse()
        return run

    def clear(self) -> None:
        """Nothing is held any more."""
        self._blocks.clear()
        self._nameless.clear()


def _take_one(counts: dict[_Key, int], key: _Key) -> bool:
    """Count one less; False if there was none."""
    count = counts.get(key)
    if count is None:
        return False
    if count > 1:
        counts[key] = count - 1
    else:
        del counts[key]
    return True
