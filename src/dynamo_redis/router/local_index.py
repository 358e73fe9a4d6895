"""What one rank of an engine holds in its KV cache, in the engine's names and in the router's. Pure.

An engine names blocks as it likes (numbers, digests); routers know sequence hashes. The same block may be
held several times: on several tiers, by one engine hash more than once (engines compute a block twice when
two requests bring it at once, and say so), or under different engine hashes. It counts as held on a tier
from its first copy there to its last.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from dynamo_redis.wire.kv_event import TIERS

EngineHash = int | bytes
"""How an engine names a block. Integers count modulo 2^64: -1 and 2^64 - 1 are the same."""

_U64: Final = (1 << 64) - 1


def engine_keys(hashes: Sequence[EngineHash]) -> list[EngineHash]:
    """Engine hashes in the one form in which they are compared."""
    return [h & _U64 if isinstance(h, int) else h for h in hashes]


class LocalIndex:
    """The blocks of one rank. About 0.5 KB and 1 µs a block."""

    __slots__ = ("_names", "_parents", "_tiers")

    def __init__(self) -> None:
        self._names: dict[EngineHash, int] = {}  # engine hash → sequence hash, while held on any tier
        self._parents: dict[int, int | None] = {}  # sequence hash → the one before, while held on any tier
        self._tiers = tuple(_Tier() for _ in TIERS)

    @property
    def block_count(self) -> int:
        """Different blocks held, on whichever tier."""
        return len(self._parents)

    def name(self, key: EngineHash) -> int | None:
        """The sequence hash of a block that is held on any tier."""
        return self._names.get(key)

    def parent(self, name: int) -> int | None:
        """The block before one that is held; None if it begins a sequence."""
        return self._parents.get(name)

    def blocks(self, tier: int) -> Collection[int]:
        """The sequence hashes held on a tier: a live view, in the order in which they came."""
        return self._tiers[tier].copies.keys()

    def holes(self, tier: int) -> Collection[int]:
        """The blocks that are missing on a tier although blocks that follow them are there: a live view."""
        return self._tiers[tier].holes

    def store(
        self, tier: int, keys: Sequence[EngineHash], names: Sequence[int], parents: Sequence[int | None]
    ) -> list[int]:
        """One more copy of each block. Answers those that were not held on the tier, in order.

        A key that is held under another name already is left as it is.
        """
        place = self._tiers[tier]
        new: list[int] = []
        for key, name, parent in zip(keys, names, parents, strict=True):
            if self._names.setdefault(key, name) == name and place.add(key, name):
                self._parents[name] = parent
                place.follow(name, parent)
                new.append(name)
        return new

    def remove(self, tier: int, keys: Sequence[EngineHash]) -> tuple[list[int], list[int]]:
        """One copy less of each block that is held. Answers what the tier holds no more, in order: blocks
        that none on the tier follows now, and blocks that some still do."""
        place = self._tiers[tier]
        gone: list[int] = []
        for key in keys:
            name = self._names.get(key)
            if name is None or not place.drop(key, name):
                continue
            if not any(key in other.held for other in self._tiers):
                del self._names[key]
            if name not in place.copies:
                place.unfollow(self._parents[name])
                gone.append(name)
                if not any(name in other.copies for other in self._tiers):
                    del self._parents[name]
        inside = [name for name in gone if name in place.followers]
        if not inside:
            return gone, inside
        place.holes.update(inside)
        return [name for name in gone if name not in place.followers], inside

    def clear(self) -> None:
        """Nothing is held any more."""
        self._names.clear()
        self._parents.clear()
        self._tiers = tuple(_Tier() for _ in TIERS)


class _Tier:
    """One tier's part."""

    __slots__ = ("copies", "followers", "held", "holes")

    def __init__(self) -> None:
        self.held: dict[EngineHash, int] = {}  # engine hash → how often it was stored and not removed
        self.copies: dict[int, int] = {}  # sequence hash → engine hashes that hold it
        self.followers: dict[int, int] = {}  # sequence hash, held or not → held blocks right behind it
        self.holes: set[int] = set()  # those of `followers` that are not held

    def add(self, key: EngineHash, name: int) -> bool:
        """One more copy; True if it is the first of the block."""
        count = self.held.get(key, 0)
        self.held[key] = count + 1
        if count:
            return False
        copies = self.copies.get(name, 0)
        self.copies[name] = copies + 1
        return not copies

    def drop(self, key: EngineHash, name: int) -> bool:
        """One copy less; True if the engine hash is held on this tier no more."""
        count = self.held.get(key, 0)
        if count != 1:
            if count:
                self.held[key] = count - 1
            return False
        del self.held[key]
        copies = self.copies[name]
        if copies > 1:
            self.copies[name] = copies - 1
        else:
            del self.copies[name]
        return True

    def follow(self, name: int, parent: int | None) -> None:
        """A block has come to the tier."""
        if self.holes:
            self.holes.discard(name)
        if parent is not None:
            self.followers[parent] = self.followers.get(parent, 0) + 1
            if parent not in self.copies:
                self.holes.add(parent)

    def unfollow(self, parent: int | None) -> None:
        """A block that followed `parent` has left the tier."""
        if parent is None:
            return
        count = self.followers[parent] - 1
        if count:
            self.followers[parent] = count
        else:
            del self.followers[parent]
            self.holes.discard(parent)
