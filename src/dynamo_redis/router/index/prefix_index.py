"""The prefix index: the KV blocks that each worker holds, and how much of a prompt that is. Pure.

**Masks.** Each tier is one flat dict: sequence hash of a block → set of the workers that hold it, as a bit
mask (`worker_slots.py`). A sequence hash names a block *and all blocks before it*. So there is no tree: a
worker that holds block i of a prompt holds it behind that prompt's prefix.

**Runs.** The run of a worker begins at the first block of a prompt and ends before the first block that the
worker does not hold. A worker that holds a block holds those before it, too, so the masks only shrink along
a prompt. Where the masks of two blocks are equal, no run ends between them.

**Leaps.** `find` uses that. It reads the mask after 1, 4, 16, … more blocks until the mask is empty or the
prompt ends, and then halves the gap between two different masks until it knows where each run ends.

**Holes.** A worker with a hole holds a block without the one before it, and says so (`REMOVED_INSIDE`). Its
runs, and all runs on the host and on disk, are walked block by block.

An example: a prompt of ten blocks. A, B and C have the bits 001, 010 and 100; C has a hole at block 1.

    block       0    1    2    3    4    5    6    7    8    9
    A  (001)    ■    ■    ■    ■    ■    ■    ■    ■    ·    ·
    B  (010)    ■    ■    ■    ·    ·    ·    ·    ·    ·    ·
    C  (100)    ■    ·    ■    ■    ·    ·    ·    ·    ·    ·
    mask       111  011  111  101  001  001  001  001  000  000

    1. the mask of block 0 is 111; C has holes, so A and B (011) are searched by leaps
    2. leap to block 1: 011, all of them            leap to block 5: 001, B's run has ended
    3. the next leap, to block 21, is past the end: no run goes on there
    4. halve between 1 (011) and 5 (001):           block 3: 001    block 2: 011    → B's run ends at 3
    5. halve between 5 (001) and 10 (000):          block 7: 001    block 8: 000    → A's run ends at 8
    6. walk the blocks for C (100):                 block 1: no                     → C's run ends at 1

    → {C: 1 block, B: 3 blocks, A: 8 blocks}; blocks 2 and 3 of C do not count: they are behind its hole

Costs: storing and removing O(blocks of the event); finding O(e · log n) for a prompt of n blocks and e
different ends of runs; `remove` O(1), and `sweep` frees its memory later. For one thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice, repeat

from dynamo_redis.router.base import Matched, Worker
from dynamo_redis.router.index.worker_slots import Ends, WorkerSlots, bits_of, slot_of
from dynamo_redis.wire.kv_event import CLEARED, DEVICE, DISK, HOST, REMOVED_INSIDE, STORED, TIERS, KvEvent

MAX_BLOCKS = 4_194_304
PRUNE_TARGET_RATIO = 0.8

_SETS_COUNT = 65_536
"""Most different sets of workers that are kept as one integer each; further sets may have copies."""
_SPARE_SLOTS_COUNT = 64
"""Dead slots beyond the number of workers, after which a new worker waits for a whole sweep."""
_GUESSES_COUNT = 4096
"""First blocks of prompts whose first run's end is remembered."""
_STEP_COUNT = 4096
"""Blocks of one step of a sweep."""


class _Forgetting(IntEnum):
    """The blocks that are to be forgotten now, to stay within the bound."""

    NONE = 0
    LONE = 1
    """Blocks that one worker holds."""
    ANY = 2


Blocks = dict[int, int]
"""A tier: sequence hash → set of workers."""


@dataclass(frozen=True, slots=True)
class IndexState:
    """A consistent copy of an index: workers by slot (None: free), the set with holes, blocks by tier."""

    workers: list[Worker | None]
    holed: int
    tiers: tuple[Blocks, ...]

    @property
    def live(self) -> int:
        """The set of all workers. Other bits in the sets of blocks do not count."""
        return sum(1 << slot for slot, worker in enumerate(self.workers) if worker is not None)


class KvIndex:
    """The blocks of all workers.

    It remembers `max_blocks` blocks at most. Past that it forgets blocks until `prune_target_ratio` of the
    bound are left: lower tiers first, then blocks that one worker holds before shared ones, old before young.
    An index that forgot finds less than there is, never more.
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
        # First block of a prompt → end of the shortest run found last: often the end of a system prompt.
        self._guesses: dict[int, int] = {}
        self._forgetting = _Forgetting.NONE
        self._sweep: _Sweep | None = None
        self.forgotten_count = 0
        """Blocks forgotten to stay within the bound."""
        self.repeated_count = 0
        """Stores of a block that the worker held already."""
        self.unknown_count = 0
        """Removals of a block that the worker did not hold: it was forgotten here, or never known."""

    @property
    def block_count(self) -> int:
        """Blocks remembered. A block on two tiers counts twice; blocks that `sweep` has yet to drop count."""
        return sum(map(len, self._tiers))

    def workers(self) -> list[Worker]:
        """Return all workers that have sent an event, and were not removed."""
        return self._slots.workers

    def block_counts(self) -> dict[Worker, int]:
        """Return the number of blocks that each worker holds, over its tiers."""
        return {worker: self._counts[slot_of(self._slots.find(worker))] for worker in self._slots.workers}

    def blocks_of(self, worker: Worker) -> dict[int, set[int]]:
        """Return the blocks that a worker holds, by tier. Looks at every block of the index."""
        bit = self._slots.find(worker)
        return {
            tier: {block for block, mask in held.items() if mask & bit}
            for tier, held in enumerate(self._tiers)
        }

    def apply(self, worker: Worker, events: Sequence[KvEvent]) -> None:
        """Apply a worker's events, in its order. Repetitions and unknown removals are counted, and
        harmless."""
        bit = self._bit_of(worker)
        for kind, tier, hashes in events:
            if kind == STORED:
                self._store(bit, self._tiers[tier], hashes)
            elif kind == CLEARED:
                self.remove(worker)
                bit = self._bit_of(worker)
            else:
                if kind == REMOVED_INSIDE and tier == DEVICE:
                    self._holed |= bit
                self._remove(bit, self._tiers[tier], hashes)
        while self.block_count > self._max_blocks:
            if not (self._slots.dead or self._forgetting):
                self._forgetting = _Forgetting.LONE
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
        """Return how much of a prompt each worker holds, without workers that hold nothing of it.

        `hashes` are the sequence hashes of the prompt's whole blocks.
        """
        if not hashes:
            return {}
        ends = self._device_ends(hashes)
        if self._tiers[HOST] or self._tiers[DISK]:
            return self._find_below(hashes, ends)
        return self._slots.matches(ends)

    def sweep(self, count: int) -> bool:
        """Look at `count` blocks: take removed workers out of their sets, or forget them to stay within the
        bound. Return True if there is more to do."""
        if self._sweep is None:
            if not (self._slots.dead or self._forgetting):
                return False
            # Lower tiers first, old blocks first; blocks may come and go meanwhile.
            blocks = ((held, block) for held in reversed(self._tiers) for block in list(held))
            self._sweep = _Sweep(self._slots.dead, blocks)
        sweep = self._sweep
        is_done = self._purge(sweep, count) if sweep.dead else self._forget(sweep, count)
        if is_done:
            self._sweep = None
        return not is_done or self._slots.dead != 0 or self._forgetting != _Forgetting.NONE

    def copy_state(self) -> IndexState:
        """Return a copy to store. Takes some 20 ms for a million blocks."""
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
        """Make an index of a state, which it takes over. `sizes` is the number of blocks of each set."""
        index = cls(max_blocks=max_blocks, prune_target_ratio=prune_target_ratio)
        index._slots = WorkerSlots(state.workers)
        index._tiers = state.tiers
        index._holed = state.holed
        index._counts = [0] * len(state.workers)
        for mask, count in sizes.items():
            index._count(mask, count)
        if index.block_count > max_blocks:
            index._forgetting = _Forgetting.LONE
        return index

    def _bit_of(self, worker: Worker) -> int:
        """Return a worker's bit; a new worker gets one."""
        if bit := self._slots.find(worker):
            return bit
        if self._slots.dead.bit_count() > len(self._slots) + _SPARE_SLOTS_COUNT:
            while self.sweep(_STEP_COUNT):
                pass
        bit = self._slots.add(worker)
        if len(self._counts) < self._slots.width:
            self._counts.append(0)
        return bit

    def _store(self, bit: int, held: Blocks, hashes: array[int]) -> None:
        """Add a worker's bit to these blocks of a tier."""
        blocks = hashes.tolist()
        known = len(held)
        before = list(map(held.setdefault, blocks, repeat(bit)))
        added = len(held) - known
        if before.count(bit) != len(before):
            joined: dict[int, int] = {}
            for block, mask in zip(blocks, before, strict=True):
                # The masks differ at the second place of a block that the event has twice.
                if not mask & bit and held[block] == mask:
                    held[block] = joined.get(mask) or joined.setdefault(mask, self._share(mask | bit))
                    added += 1
        self._counts[slot_of(bit)] += added
        self.repeated_count += len(blocks) - added

    def _remove(self, bit: int, held: Blocks, hashes: array[int]) -> None:
        """Take a worker's bit out of these blocks of a tier."""
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
        """Return the one integer that all blocks with this set share."""
        sets = self._sets
        if len(sets) >= _SETS_COUNT:
            sets.clear()
        return sets.setdefault(mask, mask)

    def _count(self, mask: int, blocks: int) -> None:
        """Add to the number of blocks of each worker of a set."""
        for bit in bits_of(mask):
            self._counts[slot_of(bit)] += blocks

    def _device_ends(self, hashes: Sequence[int]) -> Ends:
        """Return the ends of the runs on the device, short runs first."""
        held = self._tiers[DEVICE]
        start = 0
        if hashes[0] not in held and self.forgotten_count:
            # The first blocks may be forgotten; a worker that holds a later block holds them, too.
            start = next((position for position, block in enumerate(hashes) if block in held), 0)
        first = hashes[start]
        mask = held.get(first, 0) & self._slots.live
        holed = mask & self._holed
        ends: Ends = []
        if mask != holed:
            guess = self._guesses.get(first, 0)
            ends = _gallop(held, hashes, start, mask ^ holed, guess)
            shortest = ends[0][1]
            if shortest != guess:
                if len(self._guesses) >= _GUESSES_COUNT:
                    self._guesses.clear()
                self._guesses[first] = shortest
        if start or not holed:
            return ends
        return sorted(ends + _walk(held, hashes, 0, holed), key=lambda end: end[1])

    def _find_below(self, hashes: Sequence[int], device_ends: Ends) -> dict[Worker, Matched]:
        """Return the matches of all workers, where runs may go on below the device."""
        found: dict[Worker, Matched] = {}
        not_on_device = (self._slots.live ^ sum(mask for mask, _ in device_ends), 0)
        for on_device, device in (not_on_device, *device_ends):
            for on_host, host in _walk(self._tiers[HOST], hashes, device, on_device):
                for mask, disk in _walk(self._tiers[DISK], hashes, host, on_host):
                    if disk:
                        matched = Matched(device, host - device, disk - host)
                        found.update(dict.fromkeys(self._slots.workers_of(mask), matched))
        return found

    def _purge(self, sweep: _Sweep, count: int) -> bool:
        """Take the dead bits out of `count` blocks. Return True when they are out of all blocks."""
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
        """Forget those of `count` blocks that are to be forgotten. Return True when enough are forgotten, or
        all blocks were looked at."""
        excess = self.block_count - self._target_blocks
        may_be_any = self._forgetting == _Forgetting.ANY
        looked = 0
        for held, block in islice(sweep.blocks, count):
            if excess <= 0:
                break
            looked += 1
            mask = held.get(block, 0)
            if mask and (may_be_any or mask & (mask - 1) == 0):
                del held[block]
                excess -= 1
                sweep.forgotten_count += 1
                self.forgotten_count += 1
                self._count(mask & self._slots.live, -1)
        if excess <= 0:
            self._forgetting = _Forgetting.NONE
        elif looked < count and sweep.forgotten_count < excess:  # if not, more have come meanwhile
            self._forgetting = _Forgetting.ANY
        return excess <= 0 or looked < count


@dataclass(slots=True)
class _Sweep:
    """One pass over all blocks, to take out dead bits, or if there are none, to forget blocks."""

    dead: int
    blocks: Iterator[tuple[Blocks, int]]
    forgotten_count: int = 0


def _gallop(held: Blocks, hashes: Sequence[int], start: int, mask: int, guess: int) -> Ends:
    """Return the ends of the runs of the workers of `mask`, who all hold block `start` and have no holes.

    Leaps look ahead until no worker is left; then each gap between two different masks is halved until the
    ends are known. If all of them hold the block before `guess`, the search begins there.
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
    """Return the ends of the runs from block `start` on, block by block; runs of no block end at `start`."""
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
