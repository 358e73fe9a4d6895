"""The KV events of one rank of a worker: it makes them of the engine's reports, and keeps them. Pure.

The engine reports blocks by hashes of its own, with their tokens. The worker publishes sequence hashes
(`block_hashes.py`), so that a router neither hashes nor keeps engines' names. It keeps a local index, and a
ring of the events published last: a router that has missed events asks for them, or for all blocks
(`events/kv_dump.py`).

A block may follow one that was never reported here, because this side started after the engine or has missed
a report. Such a block gets its name from the prompts that the engine was sent (`events/recent_prompts.py`).
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol

from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, lora_seed, salted_seed
from dynamo_redis.events.engine_blocks import EngineHash, LocalIndex, LooseBlocks, engine_keys
from dynamo_redis.events.recent_prompts import Content, RecentPrompts
from dynamo_redis.wire import kv_event
from dynamo_redis.wire.kv_event import DEVICE, TIERS, KvEvent

log = logging.getLogger(__name__)

RING_COUNT: Final = 8192
"""Most events that a rank keeps, to send them again."""

RING_BLOCK_COUNT: Final = 1 << 18
"""Most hashes in them: 2 MiB."""

DUMP_BLOCK_COUNT: Final = 4096
"""Hashes in one event of a dump: 32 KiB."""

LOOSE_BLOCK_COUNT: Final = 1 << 14
"""Most loose blocks whose content is kept: some 0.5 KB each."""

RUN_COUNT: Final = 256
"""Most loose blocks, one behind the other, that are compared with prompts."""

_REASONS: Final = {
    "unknown_parent": "they follow blocks that the engine stored before it was heard here. Prompts that pass "
    "this worker and bring new blocks heal it; where the engine can replay its events, let it do so at once",
    "block_size": "they have not {block_size} tokens each: set the engine's block size and this one alike",
    "unknown_block": "they came without tokens, and are not known from another tier",
    "reused_hash": "their hash is that of another block",
    "bad_tokens": "their token ids are none",
}


class EventSink(Protocol):
    """Numbers events and sends them, as `events/publisher.py` does."""

    @property
    def next_sequence(self) -> int: ...

    def publish(self, event: Any, /) -> int: ...


class _Placed(NamedTuple):
    """Blocks that follow each other, by both names, with the block before them. `inferred` are the blocks
    before that one, if all of them must be held."""

    keys: Sequence[EngineHash]
    names: Sequence[int]
    parent: int | None
    inferred: Sequence[int] = ()


class KvPublisher:
    """The KV events of one data-parallel rank. Its methods publish each change before they return; they
    neither wait nor raise.

    Blocks without a name are left out of the events, counted by reason in `left_out`, and named once in the
    log:

    - `unknown_parent`: blocks behind one that was never published, or is held no longer, and whose prompt is
      not known either; they are published once they, or blocks that follow them, are found in a prompt;
    - `block_size`: blocks that have not `block_size` tokens each: set the engine's and the router's alike;
    - `unknown_block`: blocks reported without tokens, and not held on any other tier;
    - `reused_hash`: blocks whose engine hash is that of another block which is held;
    - `bad_tokens`: token ids that are not integers of 32 bits.

    A block that was left out is at worst computed once more than needed: no router expects a block that is
    not there. For the event loop's thread only.
    """

    def __init__(
        self,
        publisher: EventSink | None,
        *,
        block_size: int,
        dp_rank: int = 0,
        ring_count: int = RING_COUNT,
    ) -> None:
        """Without a publisher, events are numbered and kept, and not sent."""
        self.block_size = block_size
        self.dp_rank = dp_rank
        self.left_out: Counter[str] = Counter()
        self._publisher = publisher
        self._index = LocalIndex()
        self._loose = LooseBlocks(LOOSE_BLOCK_COUNT)
        self._prompts = RecentPrompts(block_size)
        self._next_sequence = publisher.next_sequence if publisher is not None else 0
        self._ring: deque[KvEvent] = deque()  # the events before `_next_sequence`
        self._ring_count = ring_count
        self._ring_block_count = 0

    def __repr__(self) -> str:
        return f"<KvPublisher rank {self.dp_rank}: {self.block_count} blocks, event {self._next_sequence}>"

    @property
    def next_sequence(self) -> int:
        """The sequence of the next event."""
        return self._next_sequence

    @property
    def block_count(self) -> int:
        """Number of blocks held, on all tiers together."""
        return sum(len(self._index[tier].blocks) for tier in TIERS)

    def blocks(self, tier: int = DEVICE) -> Collection[int]:
        """Return the sequence hashes held on a tier: a live view."""
        return self._index[tier].blocks.keys()

    # ----------------------------------------------------------------- prompts for the engine

    def note_prompt(self, token_ids: Sequence[int], lora_name: str | None = None) -> None:
        """Note that the engine is about to get this prompt. Call it for every prompt, before it is sent,
        where the engine's events may not all arrive. It copies the ids (about 40 µs for 4,096)."""
        self._prompts.note(token_ids, lora_seed(lora_name) if lora_name else SEED)

    # ----------------------------------------------------------------- reports of the engine

    def stored(
        self,
        block_hashes: Sequence[EngineHash],
        token_ids: Sequence[int],
        parent_hash: EngineHash | None,
        *,
        tier: int = DEVICE,
        lora_name: str | None = None,
        cache_salt: str | None = None,
    ) -> None:
        """Note that the engine holds these whole blocks now, which follow each other.

        Args:
            block_hashes: the engine's hashes of the blocks.
            token_ids: all their tokens; empty if the blocks are known from another tier.
            parent_hash: the engine's hash of the block before them; None at the start of a sequence. Without
                token ids it is not used.
            tier: the tier on which they are held.
            lora_name: the LoRA adapter that has read them.
            cache_salt: the salt of the requests that may share them; None: those without one.
        """
        keys: Sequence[EngineHash] = engine_keys(block_hashes)
        place = self._index[tier]
        new: list[int] = []
        if len(token_ids):
            seed = lora_seed(lora_name) if lora_name else SEED
            if cache_salt:
                seed = salted_seed(cache_salt, seed)
            placed = self._place(keys, token_ids, parent_hash, tier, seed)
            if placed is None:
                return
            keys, names = placed.keys, placed.names
            parents = [placed.parent, *names[:-1]]
            if placed.inferred:
                new = place.infer(placed.inferred)
            if place.uncertain:
                new += place.revive(placed.parent)
            if self._loose:
                self._loose.drop(keys)
        else:
            known = [(key, block) for key in keys if (block := self._index.block(key)) is not None]
            if len(known) < len(keys):
                self._leave_out("unknown_block", len(keys) - len(known))
            keys = [key for key, _ in known]
            names = [block.name for _, block in known]
            parents = [block.parent for _, block in known]
        conflict_count = place.conflict_count
        new += place.store(keys, names, parents)
        if place.conflict_count > conflict_count:
            self._leave_out("reused_hash", place.conflict_count - conflict_count)
        if not new:
            return
        if place.holes:
            holes = [parent for parent in parents if parent is not None and parent in place.holes]
            if holes:  # first: a reader must know of a hole before it hears of blocks behind it
                self._publish(kv_event.removed(holes, tier, inside=True))
        self._publish(kv_event.stored(new, tier))

    def stored_nameless(self, block_hashes: Sequence[EngineHash]) -> None:
        """Note that the engine holds blocks whose content depends on more than tokens and adapter. Neither
        they nor blocks that follow them are published, even where a prompt has the same tokens."""
        self._loose.add_nameless(engine_keys(block_hashes))

    def removed(self, block_hashes: Sequence[EngineHash], *, tier: int = DEVICE) -> None:
        """Note that the engine holds these blocks no longer, on this tier. Unknown ones have no effect."""
        keys = engine_keys(block_hashes)
        if self._loose and tier == DEVICE:
            self._loose.drop(keys)
        ends, inside = self._index[tier].remove(keys)
        if inside:  # first: a reader must know of a hole before it uses the blocks around it
            self._publish(kv_event.removed(inside, tier, inside=True))
        if ends:
            self._publish(kv_event.removed(ends, tier))

    def cleared(self) -> None:
        """Note that the engine has emptied its cache, on all tiers."""
        self._index.clear()
        self._loose.clear()
        self._publish(kv_event.cleared())

    def reset(self) -> None:
        """Forget and withdraw all blocks, because reports of the engine are lost and cannot be had again."""
        self.left_out["reset"] += 1
        self.cleared()

    def resize(self, block_size: int) -> None:
        """Forget and withdraw all blocks, because the engine has started anew with blocks of another size."""
        log.warning(
            "rank %d: its KV blocks have %d tokens now, and had %d", self.dp_rank, block_size, self.block_size
        )
        self.block_size = block_size
        self._prompts = RecentPrompts(block_size)
        self.reset()

    # ----------------------------------------------------------------- events and blocks for `kv_dump`

    def events_from(self, sequence: int) -> list[KvEvent] | None:
        """Return all events from `sequence` on, as they were published; None if the ring has not all of them,
        or they were never published: then only a dump helps."""
        missed_count = self._next_sequence - sequence
        if not 0 <= missed_count <= len(self._ring):
            return None
        return list(islice(self._ring, len(self._ring) - missed_count, None))

    def dump(self) -> Iterator[KvEvent]:
        """Return events that make an empty index equal to the present one, which is before `next_sequence`.

        The copy is made at once (about 0.5 ms for 100,000 blocks); the events, of up to `DUMP_BLOCK_COUNT`
        hashes, are made as they are taken.
        """
        copies = [(tier, list(self._index[tier].holes), list(self._index[tier].blocks)) for tier in TIERS]

        def events() -> Iterator[KvEvent]:
            for tier, holes, blocks in copies:
                for first in range(0, len(holes), DUMP_BLOCK_COUNT):
                    yield kv_event.removed(holes[first : first + DUMP_BLOCK_COUNT], tier, inside=True)
                for first in range(0, len(blocks), DUMP_BLOCK_COUNT):
                    yield kv_event.stored(blocks[first : first + DUMP_BLOCK_COUNT], tier)

        return events()

    # ----------------------------------------------------------------- inside

    def _place(
        self,
        keys: Sequence[EngineHash],
        token_ids: Sequence[int],
        parent_hash: EngineHash | None,
        tier: int,
        seed: int,
    ) -> _Placed | None:
        """Find the names of stored blocks, and the block before them; None if they can have no names.

        The arguments are those of `stored`, with engine hashes as `engine_keys` makes them, and the seed of
        the names.
        """
        if len(token_ids) != len(keys) * self.block_size:
            self._leave_out("block_size", len(keys))
            return None
        try:
            tokens = array("I", token_ids)
        except (TypeError, ValueError, OverflowError):
            self._leave_out("bad_tokens", len(keys))
            return None
        local = local_hashes(tokens, self.block_size, seed=seed)
        if parent_hash is None:
            return _Placed(keys, chain(local, seed=seed), None)
        (before,) = engine_keys((parent_hash,))
        parent = self._index.name(before)
        if parent is not None:
            return _Placed(keys, chain(local, parent, seed=seed), parent)
        if tier == DEVICE:
            packed, size = tokens.tobytes(), self.block_size * tokens.itemsize
            contents = [Content(block, packed[n * size : (n + 1) * size]) for n, block in enumerate(local)]
            if self._loose.is_nameless(before):
                self._loose.add_nameless(keys)
            elif (placed := self._search(keys, contents, before, seed)) is not None:
                return placed
            else:
                self._loose.add(keys, before, contents)
        self._leave_out("unknown_parent", len(keys))
        return None

    def _search(
        self, keys: Sequence[EngineHash], contents: Sequence[Content], before: EngineHash, seed: int
    ) -> _Placed | None:
        """Find the names of blocks behind one that has no name, by the prompt that they are part of.

        The loose blocks between them and the first block with a name get their names, too; the blocks before
        that one must be held.
        """
        loose = self._loose.run_to(before, RUN_COUNT)
        if loose:
            before = loose[0][1].before
        keys = [*(key for key, _ in loose), *keys]
        run = [*(block.content for _, block in loose), *contents]
        parent = self._index.name(before)
        if parent is not None:
            return _Placed(keys, chain((block.local for block in run), parent, seed=seed), parent)
        lineage = self._prompts.find(run, seed)
        if lineage is None:
            return None
        names = [lineage[-1], *chain((block.local for block in run), lineage[-1], seed=seed)]
        parent = lineage[-2] if len(lineage) > 1 else None
        return _Placed([before, *keys], names, parent, lineage[:-1])

    def _leave_out(self, reason: str, count: int) -> None:
        """Count blocks that are left out; log each reason once."""
        if reason not in self.left_out:
            log.warning(
                "rank %d: routers do not hear of some KV blocks: %s; further ones are counted only",
                self.dp_rank,
                _REASONS[reason].format(block_size=self.block_size),
            )
        self.left_out[reason] += count

    def _publish(self, event: KvEvent) -> None:
        """Number an event, keep it in the ring, and send it."""
        self._ring.append(event)
        self._ring_block_count += len(event.hashes)
        while len(self._ring) > self._ring_count or self._ring_block_count > RING_BLOCK_COUNT:
            self._ring_block_count -= len(self._ring.popleft().hashes)
        if self._publisher is None:
            self._next_sequence += 1
        else:
            self._next_sequence = self._publisher.publish(event.to_wire()) + 1
