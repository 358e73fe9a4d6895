"""Which worker holds which KV blocks, and how much of a prompt. Pure.

One flat dict a tier leads from a block's sequence hash to the set of workers that hold it, as a bit mask. A
sequence hash names a block *with all before it*, so that the tree of prefixes needs no nodes: whoever holds
the i-th block of a prompt holds it behind that very prefix.

Finding gallops: a worker that holds a block holds those before it too, so the sets only shrink along a
prompt, and where two of them are equal nothing happens in between. Workers that said otherwise
(`REMOVED_INSIDE`), and all tiers but the device, are walked block by block.

Costs: storing and removing O(blocks of the event); finding O(e · log n) for a prompt of n blocks and e
different ends; `remove` O(1), what it leaves behind is taken back by `sweep`. Not for several threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index.worker_slots import Ends, WorkerSlots, bits_of, slot_of
from dynamo_redis.wire.kv_event import CLEARED, DEVICE, DISK, HOST, REMOVED_INSIDE, STORED, TIERS, KvEvent

MAX_BLOCKS = 4_194_304
PRUNE_TARGET_RATIO = 0.8

_SETS_COUNT = 65_536
"""Different sets of workers that are shared between blocks: equal ones beyond may be there twice."""
_SPARE_SLOTS_COUNT = 64
_GUESSES_COUNT = 4096
_STEP_COUNT = 4096
_NOTHING, _LONE, _ANY = range(3)
"""What is to be forgotten now: no block, those of one worker, any."""

Blocks = dict[int, int]
"""A tier: sequence hash → set of workers."""


@dataclass(frozen=True, slots=True)
class IndexState:
    """A consistent copy of an index: workers by slot (None: free), those with holes, blocks by tier."""

    workers: list[Worker | None]
    holed: int
    tiers: tuple[Blocks, ...]

    @property
    def live(self) -> int:
        """The set of all workers. Only they count, where sets have other bits."""
        return sum(1 << slot for slot, worker in enumerate(self.workers) if worker is not None)


class KvIndex:
    """What all workers hold.

    At most `max_blocks` blocks are remembered; past that, down to `prune_target_ratio` of them, blocks of
    lower tiers are forgotten before those of higher, blocks of one worker before shared ones, old before
    young. An index that forgot finds less than there is, never more.
    """

    def __init__(
        self, *, max_blocks: int = MAX_BLOCKS, prune_target_ratio: float = PRUNE_TARGET_RATIO
    ) -> None:
        self._max_blocks = max_blocks
        self._target_blocks = int(max_blocks * prune_target_ratio)
        self._slots = WorkerSlots()
        self._tiers: tuple[Blocks, ...] = tuple({} for _ in TIERS)
        self._sets: dict[int, int] = {}
        self._counts: list[int] = []
        self._holed = 0
        # Where the first run of a prompt that began so ended last: often where a system prompt does.
        self._guesses: dict[int, int] = {}
        self._forgetting = _NOTHING
        self._sweep: _Sweep | None = None
        self.forgotten_count = 0
        """Blocks left out to stay within the bound."""
        self.repeated_count = 0
        """Stores of what the worker held already."""
        self.unknown_count = 0
        """Removals of what the worker did not hold: forgotten here, or never known."""

    @property
    def block_count(self) -> int:
        """Blocks remembered. One that is on two tiers counts twice; what `sweep` owes is among them."""
        return sum(map(len, self._tiers))

    def workers(self) -> list[Worker]:
        """All that have said something, and were not removed."""
        return self._slots.workers

    def block_counts(self) -> dict[Worker, int]:
        """How many blocks each holds, over its tiers."""
        return {worker: self._counts[slot_of(self._slots.find(worker))] for worker in self._slots.workers}

    def blocks_of(self, worker: Worker) -> dict[int, set[int]]:
        """What a worker holds, by tier. Looks at every block of the index."""
        bit = self._slots.find(worker)
        return {
            tier: {block for block, mask in held.items() if mask & bit}
            for tier, held in enumerate(self._tiers)
        }

    def apply(self, worker: Worker, events: Sequence[KvEvent]) -> None:
        """What a worker said, in its order. Repetitions and unknown removals are counted, and harmless."""
        bit = self._take(worker)
        for kind, tier, hashes in events:
            if kind == STORED:
                self._store(bit, self._tiers[tier], hashes)
            elif kind == CLEARED:
                self.remove(worker)
                bit = self._take(worker)
            else:
                if kind == REMOVED_INSIDE and tier == DEVICE:
                    self._holed |= bit
                self._remove(bit, self._tiers[tier], hashes)
        while self.block_count > self._max_blocks:
            if not (self._slots.dead or self._forgetting):
                self._forgetting = _LONE
            self.sweep(_STEP_COUNT)

    def remove(self, worker: Worker) -> None:
        """Forget a worker: at once for `find`, in memory by `sweep`."""
        bit = self._slots.kill(worker)
        if not bit:
            return
        self._holed &= ~bit
        if self._counts[slot_of(bit)]:
            self._counts[slot_of(bit)] = 0
        else:
            self._slots.release(bit)

    def find(self, hashes: Sequence[int]) -> dict[Worker, Matched]:
        """How much of a prompt each worker holds; left out is who has not even its first block, on any tier.

        `hashes` are the sequence hashes of the prompt's whole blocks.
        """
        if not hashes:
            return {}
        ends = self._device_ends(hashes)
        if self._tiers[HOST] or self._tiers[DISK]:
            return self._find_below(hashes, ends)
        return self._slots.spread(ends)

    def sweep(self, count: int) -> bool:
        """Look at `count` blocks for what is owed to removed workers and to the bound. True if more is."""
        if self._sweep is None:
            if not (self._slots.dead or self._forgetting):
                return False
            self._sweep = _Sweep(self._slots.dead, _each_block(self._tiers))
        sweep = self._sweep
        if (self._purge if sweep.dead else self._forget)(sweep, count):
            self._sweep = None
        return self._sweep is not None or self._slots.dead != 0 or self._forgetting != _NOTHING

    def copy_state(self) -> IndexState:
        """A copy to store. Takes some 20 ms for a million blocks."""
        return IndexState(self._slots.by_slot(), self._holed, tuple(held.copy() for held in self._tiers))

    @classmethod
    def of_state(
        cls,
        state: IndexState,
        sizes: Mapping[int, int],
        *,
        max_blocks: int = MAX_BLOCKS,
        prune_target_ratio: float = PRUNE_TARGET_RATIO,
    ) -> KvIndex:
        """An index that holds a state, which it takes over; `sizes`: how many blocks each set holds."""
        index = cls(max_blocks=max_blocks, prune_target_ratio=prune_target_ratio)
        index._slots = WorkerSlots(state.workers)
        index._tiers = state.tiers
        index._holed = state.holed
        index._counts = [0] * len(state.workers)
        for mask, count in sizes.items():
            index._count(mask, count)
        index._forgetting = _LONE if index.block_count > max_blocks else _NOTHING
        return index

    def _take(self, worker: Worker) -> int:
        if bit := self._slots.find(worker):
            return bit
        if self._slots.dead.bit_count() > len(self._slots) + _SPARE_SLOTS_COUNT:
            while self.sweep(_STEP_COUNT):
                pass
        bit = self._slots.take(worker)
        if len(self._counts) < self._slots.width:
            self._counts.append(0)
        return bit

    def _store(self, bit: int, held: Blocks, hashes: array[int]) -> None:
        blocks = hashes.tolist()
        known = len(held)
        before = list(map(held.setdefault, blocks, repeat(bit)))
        added = len(held) - known
        if before.count(bit) != len(before):
            joined: dict[int, int] = {}
            for block, mask in zip(blocks, before, strict=True):
                if not mask & bit and held[block] == mask:  # not if it stands here twice
                    held[block] = joined.get(mask) or joined.setdefault(mask, self._share(mask | bit))
                    added += 1
        self._counts[slot_of(bit)] += added
        self.repeated_count += len(blocks) - added

    def _remove(self, bit: int, held: Blocks, hashes: array[int]) -> None:
        blocks = hashes.tolist()
        before = list(map(held.pop, blocks, repeat(0)))
        removed = before.count(bit)
        if removed != len(before):
            others: dict[int, int] = {}
            for block, mask in zip(blocks, before, strict=True):
                if mask != bit and mask:
                    held[block] = others.get(mask) or others.setdefault(mask, self._share(mask & ~bit))
                    removed += mask & bit != 0
        self._counts[slot_of(bit)] -= removed
        self.unknown_count += len(blocks) - removed

    def _share(self, mask: int) -> int:
        """The one integer that stands for this set."""
        sets = self._sets
        if len(sets) >= _SETS_COUNT:
            sets.clear()
        return sets.setdefault(mask, mask)

    def _count(self, mask: int, blocks: int) -> None:
        for bit in bits_of(mask):
            self._counts[slot_of(bit)] += blocks

    def _device_ends(self, hashes: Sequence[int]) -> Ends:
        """Where the runs from the first block on end on the device."""
        held = self._tiers[DEVICE]
        start = 0
        if hashes[0] not in held and self.forgotten_count:
            # The beginning may be forgotten, but whoever holds a later block holds it.
            start = next((position for position, block in enumerate(hashes) if block in held), 0)
        mask = held.get(hashes[start], 0) & self._slots.live
        holed = mask & self._holed
        solid = self._gallop(hashes, start, mask ^ holed) if mask != holed else []
        if start or not holed:
            return solid
        return sorted(solid + _walk(held, hashes, 0, holed), key=lambda end: end[1])

    def _gallop(self, hashes: Sequence[int], start: int, mask: int) -> Ends:
        """Where the runs of workers that promise no holes, and hold block `start`, end on the device."""
        guess = self._guesses.get(hashes[start], 0)
        ends = _gallop(self._tiers[DEVICE], hashes, start, mask, guess)
        first_end = ends[0][1]
        if first_end != guess:
            if len(self._guesses) >= _GUESSES_COUNT:
                self._guesses.clear()
            self._guesses[hashes[start]] = first_end
        return ends

    def _find_below(self, hashes: Sequence[int], device_ends: Ends) -> dict[Worker, Matched]:
        found: dict[Worker, Matched] = {}
        nobody = (self._slots.live ^ sum(mask for mask, _ in device_ends), 0)
        for on_device, device in (nobody, *device_ends):
            for on_host, host in _walk(self._tiers[HOST], hashes, device, on_device):
                for mask, disk in _walk(self._tiers[DISK], hashes, host, on_host):
                    if disk:
                        matched = Matched(device, host - device, disk - host)
                        found.update(dict.fromkeys(self._slots.each(mask), matched))
        return found

    def _purge(self, sweep: _Sweep, count: int) -> bool:
        """Take the dead out of `count` blocks. True when they are out of all."""
        looked = 0
        for held, block in islice(sweep.blocks, count):
            looked += 1
            mask = held.get(block, 0)
            if not mask & sweep.dead:
                continue
            if kept := mask & ~sweep.dead:
                held[block] = self._share(kept)
            else:
                del held[block]
        if looked == count:
            return False
        self._slots.release(sweep.dead)
        return True

    def _forget(self, sweep: _Sweep, count: int) -> bool:
        """Leave out those of `count` blocks that are due. True when enough are left out, or all looked at."""
        excess = self.block_count - self._target_blocks
        looked = 0
        for held, block in islice(sweep.blocks, count):
            if excess <= 0:
                break
            looked += 1
            mask = held.get(block, 0)
            if mask and (self._forgetting == _ANY or mask & (mask - 1) == 0):
                del held[block]
                excess -= 1
                sweep.forgotten_count += 1
                self.forgotten_count += 1
                self._count(mask & self._slots.live, -1)
        if excess <= 0:
            self._forgetting = _NOTHING
        elif looked < count and sweep.forgotten_count < excess:  # if not, more have come meanwhile
            self._forgetting = _ANY
        return excess <= 0 or looked < count


@dataclass(slots=True)
class _Sweep:
    """One pass over all blocks, to take out the dead; or, if there are none, to forget."""

    dead: int
    blocks: Iterator[tuple[Blocks, int]]
    forgotten_count: int = 0


def _each_block(tiers: tuple[Blocks, ...]) -> Iterator[tuple[Blocks, int]]:
    """All blocks, lower tiers first, old ones first, and where they stand; others may come and go."""
    for held in reversed(tiers):
        for block in list(held):
            yield held, block


def _gallop(held: Blocks, hashes: Sequence[int], start: int, mask: int, guess: int) -> Ends:
    """Where the runs of workers that all hold block `start` end, if the sets only shrink.

    Ever longer leaps find where nobody is left; between what they saw, halving finds the rest. No run is
    taken to end before `guess`, if that proves true.
    """
    ends: Ends = []
    get, count = held.get, len(hashes)
    if start < guess <= count and get(hashes[guess - 1], 0) & mask == mask:
        start = guess - 1
    ahead = []
    position, leap, there = start, 1, mask
    while there and (position := position + leap) < count:
        there = get(hashes[position], 0) & mask
        ahead.append((position, there))
        leap *= 4
    ahead.append((count, 0))
    ahead.reverse()
    low = start
    while mask:
        high, there = ahead.pop()
        kept = there & mask
        if kept != mask:
            while high - low > 1:
                middle = (low + high) >> 1
                there = get(hashes[middle], 0) & mask
                if there == mask:
                    low = middle
                else:
                    ahead.append((high, kept))
                    high, kept = middle, there
            ends.append((mask ^ kept, high))
            mask = kept
        low = high
    return ends


def _walk(held: Blocks, hashes: Sequence[int], start: int, mask: int) -> Ends:
    """Where the runs from block `start` on end, block by block. Ends at `start` are among them."""
    ends: Ends = []
    for position in range(start, len(hashes)):
        if not mask:
            break
        kept = held.get(hashes[position], 0) & mask
        if kept != mask:
            ends.append((mask ^ kept, position))
            mask = kept
    if mask:
        ends.append((mask, len(hashes)))
    return ends
