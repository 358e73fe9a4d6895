"""What one rank of an engine holds in its KV cache, in the engine's names and in the router's. Pure.

An engine names blocks as it likes (numbers, digests); routers know sequence hashes. The same block may be
held several times: on several tiers, by one engine hash more than once (vLLM computes a block twice when two
requests bring it at once, and reports each copy), or under different engine hashes. It counts as held on a
tier from its first copy there to its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

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
    """The blocks of one tier. To be changed by `store` and `remove` alone."""

    __slots__ = ("_followers", "_more_copies", "_repeats", "blocks", "conflict_count", "held", "holes")

    def __init__(self) -> None:
        self.held: dict[EngineHash, int] = {}  # engine hash → sequence hash
        self.blocks: dict[int, int | None] = {}  # sequence hash → the one before, in order of arrival
        self.holes: set[int] = set()  # what is not held, although something that follows it is
        self.conflict_count = 0
        self._followers: dict[int, int] = {}  # sequence hash, held or not → blocks held right behind it
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
            parent = blocks.pop(name)
            gone.append(name)
            if parent is not None:
                left_count = followers[parent] - 1
                if left_count:
                    followers[parent] = left_count
                else:
                    del followers[parent]
                    holes.discard(parent)
        inside = [name for name in gone if name in followers]
        if not inside:
            return gone, inside
        holes.update(inside)
        return [name for name in gone if name not in followers], inside


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
