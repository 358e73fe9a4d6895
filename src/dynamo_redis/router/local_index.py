"""What one rank of an engine holds in its KV cache, in the engine's names and in the router's. Pure.

An engine names blocks as it likes (numbers, digests); routers know sequence hashes. The same block may be
held several times: on several tiers, by one engine hash more than once (vLLM computes a block twice when two
requests bring it at once, and reports each copy), or under different engine hashes. It counts as held on a
tier from its first copy there to its last.

Of some blocks the engine's name is not known, only that it must hold them, since it holds what follows them:
they are *inferred*. Of others only the engine's name is known, and what they contain, but not what stands
before them: they are *loose*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

from dynamo_redis.router.recent_prompts import Content
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
        "_followers",
        "_inferred",
        "_more_copies",
        "_repeats",
        "blocks",
        "conflict_count",
        "held",
        "holes",
    )

    def __init__(self) -> None:
        self.held: dict[EngineHash, int] = {}  # engine hash → sequence hash
        self.blocks: dict[int, int | None] = {}  # sequence hash → the one before, in order of arrival
        self.holes: set[int] = set()  # what is not held, although something that follows it is
        self.conflict_count = 0
        self._followers: dict[int, int] = {}  # sequence hash, held or not → blocks held right behind it
        self._inferred: set[int] = set()  # those of `blocks` that are held under no known engine hash
        self._repeats: dict[EngineHash, int] = {}  # how often an engine hash was stored again
        self._more_copies: dict[int, int] = {}  # further engine hashes that hold the same block

    def store(
        self, keys: Sequence[EngineHash], names: Sequence[int], parents: Sequence[int | None]
    ) -> list[int]:
        """One more copy of each block. Answers those that were not held, in order.

        A key that is held under another name is left as it is, and counted in `conflict_count`.
        """
        held, blocks, followers, holes = self.held, self.blocks, self._followers, self.holes
        new: list[int] = []
        for key, name, parent in zip(keys, names, parents, strict=True):
            if key in held:
                if held[key] == name:
                    self._repeats[key] = self._repeats.get(key, 0) + 1
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
                holes.discard(name)
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
                self.holes.discard(name)
                if parent is not None:
                    self._followers[parent] = self._followers.get(parent, 0) + 1
                new.append(name)
            parent = name
        return new

    def remove(self, keys: Sequence[EngineHash]) -> tuple[list[int], list[int]]:
        """One copy less of each block that is held. Answers what is held no more: blocks that nothing
        follows here now, and blocks that something still does."""
        held, blocks, followers, holes = self.held, self.blocks, self._followers, self.holes
        gone: list[int] = []
        for key in keys:
            name = held.get(key)
            if name is None or (self._repeats and _take_one(self._repeats, key)):
                continue
            del held[key]
            if self._more_copies and _take_one(self._more_copies, name):
                continue
            while True:
                parent = blocks.pop(name)
                gone.append(name)
                if parent is None:
                    break
                left_count = followers[parent] - 1
                if left_count:
                    followers[parent] = left_count
                    break
                del followers[parent]
                holes.discard(parent)
                if parent not in self._inferred:
                    break
                self._inferred.discard(parent)
                name = parent  # it was inferred from this one
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
