"""The blocks in the KV cache of one rank of an engine, by the engine's names and by the router's. Pure.

An engine names blocks by hashes of its own (numbers, digests); routers know sequence hashes. The same block
may be held several times: on several tiers, or under different engine hashes. It counts as held on a tier
from its first engine hash there to its last.

One engine hash may be reported several times: each time that a request finds the block (vLLM's full reports),
or for each copy, if two requests computed the block at once. The reports do not show which of the two it is.
So a second report counts as no further copy, and the first removal ends the block, which is then *uncertain*:
a copy may be left. If the engine stores a block behind it later, a copy was left, and it is held again
(`revive`).

An *inferred* block has no known engine hash; the engine must hold it, because it holds blocks that follow it.
A *loose* block has a known engine hash and content, but the blocks before it are not known.
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
    """Return engine hashes in the form in which they are compared."""
    return [h & _U64 if isinstance(h, int) else h for h in hashes]


class Block(NamedTuple):
    """The sequence hash of a block, and of the block before it (None: it begins the sequence)."""

    name: int
    parent: int | None


class LocalIndex:
    """The blocks of one rank, by tier. It takes some 0.25 KB a block."""

    __slots__ = ("_tiers",)

    def __init__(self) -> None:
        self._tiers = tuple(TierIndex() for _ in TIERS)

    def __getitem__(self, tier: int) -> TierIndex:
        return self._tiers[tier]

    def name(self, key: EngineHash) -> int | None:
        """Return the sequence hash of a block that is held on any tier; None if it is on none."""
        for tier in self._tiers:
            if (name := tier.held.get(key)) is not None:
                return name
        return None

    def block(self, key: EngineHash) -> Block | None:
        """Return a block that is held on any tier; None if it is on none."""
        for tier in self._tiers:
            if (name := tier.held.get(key)) is not None:
                return Block(name, tier.blocks[name])
        return None

    def clear(self) -> None:
        """Forget all blocks."""
        self._tiers = tuple(TierIndex() for _ in TIERS)


class TierIndex:
    """The blocks of one tier. Only its methods change them."""

    __slots__ = (
        "_before_uncertain",
        "_followers",
        "_inferred",
        "_more_copies",
        "_reported_again",
        "blocks",
        "conflict_count",
        "held",
        "holes",
        "uncertain",
    )

    def __init__(self) -> None:
        self.held: dict[EngineHash, int] = {}  # engine hash → sequence hash
        self.blocks: dict[int, int | None] = {}  # sequence hash → the one before, in order of arrival
        self.holes: set[int] = set()  # blocks that are not held, although a block that follows them is
        self.uncertain: dict[int, int | None] = {}
        """Blocks that were removed after a second report, so that a copy may be left, and that a held or
        uncertain block follows: each with the block before it."""
        self.conflict_count = 0
        """Reports of an engine hash that is held under another sequence hash."""
        self._followers: dict[int, int] = {}  # sequence hash, held or not → blocks held right behind it
        self._inferred: set[int] = set()  # those of `blocks` that are held under no known engine hash
        self._reported_again: set[EngineHash] = set()  # those of `held` that were stored more than once
        self._before_uncertain: dict[int, int] = {}  # sequence hash → uncertain blocks right behind it
        self._more_copies: dict[int, int] = {}  # sequence hash → further engine hashes that hold the block

    def store(
        self, keys: Sequence[EngineHash], names: Sequence[int], parents: Sequence[int | None]
    ) -> list[int]:
        """Note that each block is held; return the names of those that were not held before, in order.

        A key that is held under another name stays as it is, and is counted in `conflict_count`.
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
                    self._inferred.discard(name)  # its engine hash is known now, and will end it
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
        """Note that the blocks of `lineage`, from the beginning of a sequence on, are held, because a block
        that follows them is held or about to be stored. Return those that were not held before, in order.

        Each is held until the last block that follows it is gone, or until `store` gives it an engine hash.
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
        """Note that a block was stored behind `name`: the uncertain blocks up to `name` are held, as inferred
        ones. Return them, from the beginning on. O(blocks before) while any block is uncertain."""
        revived: list[int] = []
        while self.uncertain and name is not None:
            if name in self.blocks:
                name = self.blocks[name]
            elif name in self.uncertain:
                revived.append(name)
                self.blocks[name] = parent = self.uncertain[name]
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
        """Note that a block is held: it is neither a hole nor uncertain."""
        self.holes.discard(name)
        if name in self.uncertain:
            self._drop_uncertain(name)

    def _drop_uncertain(self, name: int) -> int | None:
        """Forget an uncertain block; return the block before it."""
        before = self.uncertain.pop(name)
        if before is not None:
            _decrement(self._before_uncertain, before)
        return before

    def _lose_followers(self, name: int) -> None:
        """Note that no block behind `name` is held any more. Uncertain blocks up to it are forgotten: no
        later block can show that they are held."""
        self.holes.discard(name)
        before: int | None = name
        while (
            before in self.uncertain
            and before not in self._followers
            and before not in self._before_uncertain
        ):
            before = self._drop_uncertain(before)

    def _note_uncertain(self, removed: dict[int, int | None]) -> None:
        """Remember removed blocks of which a copy may be left, and which a held or uncertain block
        follows."""
        for block in removed:
            name: int | None = block
            while name in removed and name not in self.uncertain:
                if name not in self._followers and name not in self._before_uncertain:
                    break
                before = removed[name]
                self.uncertain[name] = before
                if before is not None:
                    self._before_uncertain[before] = self._before_uncertain.get(before, 0) + 1
                name = before

    def remove(self, keys: Sequence[EngineHash]) -> tuple[list[int], list[int]]:
        """Note that these engine hashes hold their blocks no longer.

        Return the blocks that are not held any more: first those that no held block follows, then those that
        a held block follows.
        """
        held, blocks, followers, holes = self.held, self.blocks, self._followers, self.holes
        gone: list[int] = []
        uncertain: dict[int, int | None] = {}
        for key in keys:
            name = held.get(key)
            if name is None:
                continue
            del held[key]
            may_be_held = key in self._reported_again
            self._reported_again.discard(key)
            if self._more_copies and _decrement(self._more_copies, name):
                continue
            while True:
                parent = blocks.pop(name)
                gone.append(name)
                if may_be_held:
                    uncertain[name] = parent
                    may_be_held = False  # the blocks inferred from it were not reported at all
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
        if uncertain:
            self._note_uncertain(uncertain)
        inside = [name for name in gone if name in followers]
        if not inside:
            return gone, inside
        holes.update(inside)
        return [name for name in gone if name not in followers], inside


class LooseBlock(NamedTuple):
    """A block whose place is not known: the engine hash of the block before it, and its content."""

    before: EngineHash
    content: Content


class LooseBlocks:
    """Blocks of the device without a sequence hash: *loose* ones, whose place may be found later, and
    *nameless* ones, which never get one. Past `max_count` of either the oldest are forgotten."""

    def __init__(self, max_count: int) -> None:
        self._max_count = max_count
        self._blocks: dict[EngineHash, LooseBlock] = {}
        self._nameless: dict[EngineHash, None] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._blocks) + len(self._nameless)

    def add(self, keys: Sequence[EngineHash], before: EngineHash, contents: Sequence[Content]) -> None:
        """Add blocks that follow each other; the first of them follows `before`."""
        for key, content in zip(keys, contents, strict=True):
            self._blocks[key] = LooseBlock(before, content)
            before = key
        while len(self._blocks) > self._max_count:
            del self._blocks[next(iter(self._blocks))]

    def add_nameless(self, keys: Sequence[EngineHash]) -> None:
        """Add blocks whose content depends on more than tokens, or that follow such a block."""
        self._nameless.update(dict.fromkeys(keys))
        while len(self._nameless) > self._max_count:
            del self._nameless[next(iter(self._nameless))]

    def is_nameless(self, key: EngineHash) -> bool:
        """Return whether a block is nameless: blocks behind it are then nameless, too."""
        return key in self._nameless

    def drop(self, keys: Sequence[EngineHash]) -> None:
        """Forget blocks that are held no longer, or have a place now."""
        for key in keys:
            self._blocks.pop(key, None)
            self._nameless.pop(key, None)

    def run_to(self, key: EngineHash, max_count: int) -> list[tuple[EngineHash, LooseBlock]]:
        """Return the run of loose blocks that ends with `key`, if that is loose; `max_count` at most."""
        run: list[tuple[EngineHash, LooseBlock]] = []
        while len(run) < max_count and (block := self._blocks.get(key)) is not None:
            run.append((key, block))
            key = block.before
        run.reverse()
        return run

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
        self._nameless.clear()


def _decrement(counts: dict[_Key, int], key: _Key) -> bool:
    """Lower a count by one, and drop it at zero; return False if there was none."""
    count = counts.get(key)
    if count is None:
        return False
    if count > 1:
        counts[key] = count - 1
    else:
        del counts[key]
    return True
