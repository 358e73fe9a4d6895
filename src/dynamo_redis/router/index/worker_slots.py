"""Workers as bits: each has a slot, so that a set of workers is one integer. Pure.

The slot of a worker that is gone is *dead*: its bit may still be in many sets, and has no meaning. The slot
is given to another worker when its bit is in no set any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from dynamo_redis.router.base import Matched, Worker

_EXPANSIONS_COUNT = 256
"""Sets that are cached as dicts. With 256 workers each takes some 10 KB."""

_LOOKUP_COST = 16
"""Cost of one worker that is looked up by its bit, in workers that are copied from a cached dict."""

Ends = list[tuple[int, int]]
"""Sets of workers, each with the position at which its runs end; short runs first, no worker twice."""


class WorkerSlots:
    """The slots of all workers. `live` is the set of all workers, `dead` the set of the dead slots."""

    def __init__(self, workers: Iterable[Worker | None] = ()) -> None:
        """`workers` by slot; None where a slot is free."""
        slots = list(workers)
        self._workers = {1 << slot: worker for slot, worker in enumerate(slots) if worker is not None}
        self._bits = {worker: bit for bit, worker in self._workers.items()}
        self._free = [slot for slot, worker in enumerate(slots) if worker is None]
        self._expansions: dict[tuple[int, int], dict[Worker, Matched]] = {}
        self.width = len(slots)
        """Number of slots: live, dead and free."""
        self.live = sum(self._workers)
        self.dead = 0

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def workers(self) -> list[Worker]:
        """All workers."""
        return list(self._bits)

    def by_slot(self) -> list[Worker | None]:
        """Return all workers, by slot; None where there is none."""
        return [self._workers.get(1 << slot) for slot in range(self.width)]

    def find(self, worker: Worker) -> int:
        """Return a worker's bit, or 0 if it has none."""
        return self._bits.get(worker, 0)

    def add(self, worker: Worker) -> int:
        """Return a worker's bit; a new worker gets a free slot."""
        if bit := self._bits.get(worker):
            return bit
        if self._free:
            slot = self._free.pop()
        else:
            slot = self.width
            self.width += 1
        bit = self._bits[worker] = 1 << slot
        self._workers[bit] = worker
        self.live |= bit
        return bit

    def kill(self, worker: Worker) -> int:
        """Make a worker's slot dead, and return its bit; 0 if it had none."""
        bit = self._bits.pop(worker, 0)
        if bit:
            del self._workers[bit]
            self.live ^= bit
            self.dead |= bit
            self._expansions.clear()
        return bit

    def release(self, dead: int) -> None:
        """Free these dead slots: their bits are in no set any more."""
        self.dead &= ~dead
        self._free.extend(map(slot_of, bits_of(dead)))

    def workers_of(self, mask: int) -> Iterator[Worker]:
        """Return the workers of a set, all of them live."""
        return map(self._workers.__getitem__, bits_of(mask))

    def matches(self, ends: Ends) -> dict[Worker, Matched]:
        """Return the blocks that each worker holds on its device, by the ends of the live workers' runs.

        Ends are taken from the shortest run on. Where few runs end, their workers are written one by one.
        Where many end, all workers that reach this end are written; those that reach further are overwritten
        later. The set of all of them is the mask of a block and comes again with the next prompts, so it is
        cached as a dict.
        """
        found: dict[Worker, Matched] = {}
        reaching = 0
        for mask, _ in ends:
            reaching |= mask
        for mask, end in ends:
            if mask & (mask - 1) == 0:
                found[self._workers[mask]] = _on_device(end)
            elif mask.bit_count() * _LOOKUP_COST < reaching.bit_count():
                found.update(dict.fromkeys(self.workers_of(mask), _on_device(end)))
            elif found:
                found.update(self._all_reaching(reaching, end))
            else:
                found = self._all_reaching(reaching, end).copy()
            reaching ^= mask
        return found

    def _all_reaching(self, mask: int, end: int) -> dict[Worker, Matched]:
        """Return the workers of a set, each with `end` blocks. The dict is cached, and must not be
        changed."""
        expansion = self._expansions.get((mask, end))
        if expansion is None:
            if len(self._expansions) >= _EXPANSIONS_COUNT:
                self._expansions.clear()
            expansion = dict.fromkeys(self.workers_of(mask), _on_device(end))
            self._expansions[mask, end] = expansion
        return expansion


@lru_cache(maxsize=4096)
def _on_device(blocks: int) -> Matched:
    return Matched(blocks)


def bits_of(mask: int) -> Iterator[int]:
    """Yield the single bits of a set, lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def slot_of(bit: int) -> int:
    """Return the slot of a single bit."""
    return bit.bit_length() - 1
