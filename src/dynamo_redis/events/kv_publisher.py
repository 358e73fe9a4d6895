"""What a worker tells routers of one rank's KV cache, and what it can tell again. Pure.

The engine reports blocks by hashes of its own, with their tokens; what is published are sequence hashes
(`block_hashes.py`), so that a router neither hashes nor keeps engines' names. Beside it stands the local
index, and a ring of the events published last: whoever has missed some asks for them, or for everything
(`events/kv_dump.py`).

Blocks that follow one of which this side never heard, because it came after the engine or has missed
something, get their names from the prompts that the engine was sent (`events/recent_prompts.py`).
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from itertools import chain as chained
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol

from dynamo_redis.events.block_hashes import SEED, chain, local_hashes, lora_seed
from dynamo_redis.events.engine_blocks import EngineHash, LocalIndex, LooseBlocks, engine_keys
from dynamo_redis.events.recent_prompts import Content, RecentPrompts
from dynamo_redis.wire import kv_event
from dynamo_redis.wire.kv_event import DEVICE, TIERS, KvEvent

log = logging.getLogger(__name__)

RING_COUNT: Final = 8192
"""Events that a rank can tell again."""

RING_BLOCK_COUNT: Final = 1 << 18
"""Hashes in them, at most: 2 MiB."""

DUMP_BLOCK_COUNT: Final = 4096
"""Hashes in one event of a dump: 32 KiB."""

LOOSE_BLOCK_COUNT: Final = 1 << 14
"""Blocks without a name of which the content is kept: some 0.5 KB each."""

RUN_COUNT: Final = 256
"""So many of them, one behind the other, are held against prompts."""

_REASONS: Final = {
    "unknown_parent": "they follow blocks that the engine stored before it was heard here. Prompts that pass "
    "this worker and bring new blocks heal it; where the engine can replay its events, let it do so at once",
    "block_size": "they have not {block_size} tokens each: set the engine's block size and this one alike",
    "unknown_block": "they came without tokens, and are not known from another tier",
    "reused_hash": "their hash is that of another block",
    "bad_tokens": "their token ids are none",
}


class Publisher(Protocol):
    """Numbers events and sends them; `events/publisher.py` has it."""

    @property
    def next_sequence(self) -> int: ...

    def publish(self, event: Any, /) -> int: ...


class _Placed(NamedTuple):
    """Blocks one behind the other, by both names; what stands before them, and of that what must be held."""

    keys: Sequence[EngineHash]
    names: Sequence[int]
    parent: int | None
    inferred: Sequence[int] = ()


class KvPublisher:
    """One data-parallel rank. Every change is published before the call returns; none waits or raises.

    What cannot be told is left out, counted by reason in `left_out`, and said once in the log:

    - `unknown_parent`: blocks that follow one which was never told, or is held no longer, and whose prompt is
      not known either; they are told once they, or what follows them, are found in a prompt;
    - `block_size`: blocks whose tokens are not `block_size` each: set the engine's and the router's alike;
    - `unknown_block`: blocks reported without tokens, and not held on any other tier;
    - `reused_hash`: blocks whose engine hash is that of another block which is held;
    - `bad_tokens`: token ids that are not integers of 32 bits.

    A block that was left out is computed once more than needed, at worst: no router believes in a block
    that is not there. Not for other threads than the event loop's.
    """

    def __init__(
        self,
        publisher: Publisher | None,
        *,
        block_size: int,
        dp_rank: int = 0,
        ring_count: int = RING_COUNT,
    ) -> None:
        """Without a publisher, events are numbered and kept, and nothing is sent."""
        self.block_size = block_size
        self.dp_rank = dp_rank
        self.left_out: Counter[str] = Counter()
        self._publisher = publisher
        self._index = LocalIndex()
        self._loose = LooseBlocks(LOOSE_BLOCK_COUNT)
        self._prompts = RecentPrompts(block_size)
        self._next_sequence = publisher.next_sequence if publisher is not None else 0
        self._ring: deque[KvEvent] = deque()  # those before `_next_sequence`
        self._ring_count = ring_count
        self._ring_block_count = 0

    def __repr__(self) -> str:
        return f"<KvPublisher rank {self.dp_rank}: {self.block_count} blocks, event {self._next_sequence}>"

    @property
    def next_sequence(self) -> int:
        """What the next event will be numbered."""
        return self._next_sequence

    @property
    def block_count(self) -> int:
        """Blocks held, on all tiers together."""
        return sum(len(self._index[tier].blocks) for tier in TIERS)

    def blocks(self, tier: int = DEVICE) -> Collection[int]:
        """The sequence hashes held on a tier: a live view."""
        return self._index[tier].blocks.keys()

    # ----------------------------------------------------------------- what the engine is sent

    def note_prompt(self, token_ids: Sequence[int], lora_name: str | None = None) -> None:
        """The engine is about to be sent this prompt. To be called for every one, before it is sent, where
        not all of the engine's events are sure to arrive; it copies the ids (about 40 µs for 4,096)."""
        self._prompts.note(token_ids, lora_seed(lora_name) if lora_name else SEED)

    # ----------------------------------------------------------------- what the engine says

    def stored(
        self,
        block_hashes: Sequence[EngineHash],
        token_ids: Sequence[int],
        parent_hash: EngineHash | None,
        *,
        tier: int = DEVICE,
        lora_name: str | None = None,
    ) -> None:
        """The engine holds these whole blocks now, one after the other, behind `parent_hash` (None: at the
        start of a sequence). `token_ids` are all their tokens.

        Without token ids the blocks are those known from another tier; `parent_hash` then says nothing.
        """
        keys: Sequence[EngineHash] = engine_keys(block_hashes)
        place = self._index[tier]
        new: list[int] = []
        if len(token_ids):
            placed = self._place(keys, token_ids, parent_hash, tier, lora_name)
            if placed is None:
                return
            keys, names = placed.keys, placed.names
            parents = [placed.parent, *names[:-1]]
            if placed.inferred:
                new = place.infer(placed.inferred)
            if place.doubtful:
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
            told = [parent for parent in parents if parent is not None and parent in place.holes]
            if told:  # first: a reader must know of a hole before it trusts what lies behind
                self._publish(kv_event.removed(told, tier, inside=True))
        self._publish(kv_event.stored(new, tier))

    def stored_nameless(self, block_hashes: Sequence[EngineHash]) -> None:
        """The engine holds these blocks now, and what they contain depends on more than tokens and adapter:
        neither they nor what follows them can be told, whatever prompts it looks like."""
        self._loose.add_nameless(engine_keys(block_hashes))

    def removed(self, block_hashes: Sequence[EngineHash], *, tier: int = DEVICE) -> None:
        """The engine holds these blocks no longer, on this tier. Unknown ones have no effect."""
        keys = engine_keys(block_hashes)
        if self._loose and tier == DEVICE:
            self._loose.drop(keys)
        ends, inside = self._index[tier].remove(keys)
        if inside:  # first: a reader must know of a hole before it trusts what lies around
            self._publish(kv_event.removed(inside, tier, inside=True))
        if ends:
            self._publish(kv_event.removed(ends, tier))

    def cleared(self) -> None:
        """The engine has emptied its cache, on all tiers."""
        self._index.clear()
        self._loose.clear()
        self._publish(kv_event.cleared())

    def reset(self) -> None:
        """What the engine said has a gap that nobody can fill: nothing told so far counts any more."""
        self.left_out["reset"] += 1
        self.cleared()

    def resize(self, block_size: int) -> None:
        """The engine has started anew, with blocks of so many tokens: nothing told so far counts any more."""
        log.warning(
            "rank %d: its KV blocks have %d tokens now, and had %d", self.dp_rank, block_size, self.block_size
        )
        self.block_size = block_size
        self._prompts = RecentPrompts(block_size)
        self.reset()

    # ----------------------------------------------------------------- what can be told again

    def events_from(self, sequence: int) -> list[KvEvent] | None:
        """All events from that one on, as they were published; None if some are forgotten, or were never
        published: then only a dump helps."""
        missed_count = self._next_sequence - sequence
        if not 0 <= missed_count <= len(self._ring):
            return None
        return list(islice(self._ring, len(self._ring) - missed_count, None))

    def dump(self) -> Iterator[KvEvent]:
        """Events that make an empty index equal to this one as it is now, before `next_sequence`.

        The copy is made at once (about 0.5 ms for 100,000 blocks); the events, of up to `DUMP_BLOCK_COUNT`
        hashes, are made as they are taken.
        """
        return chained.from_iterable([self._dump_tier(tier) for tier in TIERS])

    def _dump_tier(self, tier: int) -> Iterator[KvEvent]:
        holes = list(self._index[tier].holes)
        blocks = list(self._index[tier].blocks)

        def events() -> Iterator[KvEvent]:
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
        lora_name: str | None,
    ) -> _Placed | None:
        """New blocks by their names, with what is found to precede them; None if they can have none."""
        if len(token_ids) != len(keys) * self.block_size:
            self._leave_out("block_size", len(keys))
            return None
        seed = lora_seed(lora_name) if lora_name else SEED
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
            contents = self._contents(local, tokens)
            if self._loose.is_nameless(before):
                self._loose.add_nameless(keys)
            elif (placed := self._search(keys, contents, before, seed)) is not None:
                return placed
            else:
                self._loose.add(keys, before, contents)
        self._leave_out("unknown_parent", len(keys))
        return None

    def _contents(self, local: Sequence[int], tokens: array[int]) -> list[Content]:
        content = tokens.tobytes()
        size = self.block_size * tokens.itemsize
        return [Content(block, content[n * size : (n + 1) * size]) for n, block in enumerate(local)]

    def _search(
        self, keys: Sequence[EngineHash], contents: Sequence[Content], before: EngineHash, seed: int
    ) -> _Placed | None:
        """Blocks behind one without a name, by the prompt that they are of. With them goes what lies between
        them and the first block that has a name, or whose name is found; all before that is held, too."""
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
        if reason not in self.left_out:
            log.warning(
                "rank %d: routers do not hear of some KV blocks: %s; further ones are counted only",
                self.dp_rank,
                _REASONS[reason].format(block_size=self.block_size),
            )
        self.left_out[reason] += count

    def _publish(self, event: KvEvent) -> None:
        self._ring.append(event)
        self._ring_block_count += len(event.hashes)
        while len(self._ring) > self._ring_count or self._ring_block_count > RING_BLOCK_COUNT:
            self._ring_block_count -= len(self._ring.popleft().hashes)
        if self._publisher is None:
            self._next_sequence += 1
        else:
            self._next_sequence = self._publisher.publish(event.to_wire()) + 1
