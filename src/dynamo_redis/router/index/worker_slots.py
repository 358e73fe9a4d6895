"""Workers as bits: each has a slot, so that a set of workers is one integer. Pure.

The slot of a worker that is gone is *dead*: its bit may stand in many sets still, and means nobody. Only when
it stands in none any more is the slot given to another worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from dynamo_redis.router.base import Matched, Worker

_EXPANSIONS_COUNT = 256
"""Sets that are kept written out. Of 256 workers each takes some 10 KB."""

_FEW = 16
"""A worker that is looked up for its bit costs so many times what it does in a set that is written out."""

Ends = list[tuple[int, int]]
"""Sets of workers, each with where its run of blocks ends; short runs first, no worker twice."""


class WorkerSlots:
    """Which bit is whose. `live` is the set of all workers, `dead` that of the dead slots."""

    def __init__(self, workers: Iterable[Worker | None] = ()) -> None:
        """`workers` by slot; None where a slot is free."""
        slots = list(workers)
        self._workers = {1 << slot: worker for slot, worker in enumerate(slots) if worker is not None}
        self._bits = {worker: bit for bit, worker in self._workers.items()}
        self._free = [slot for slot, worker in enumerate(slots) if worker is None]
        self._expansions: dict[tuple[int, int], dict[Worker, Matched]] = {}
        self.width = len(slots)
        """How many slots there are: live, dead and free."""
        self.live = sum(self._workers)
        self.dead = 0

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def workers(self) -> list[Worker]:
        """All workers."""
        return list(self._bits)

    def by_slot(self) -> list[Worker | None]:
        """All workers, by slot; None where there is none."""
        return [self._workers.get(1 << slot) for slot in range(self.width)]

    def find(self, worker: Worker) -> int:
        """A worker's bit, 0 if it has none."""
        return self._bits.get(worker, 0)

    def take(self, worker: Worker) -> int:
        """A worker's bit; a new worker gets a free slot."""
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
        """These dead bits stand in no set any more."""
        self.dead &= ~dead
        self._free.extend(map(slot_of, bits_of(dead)))

    def each(self, mask: int) -> Iterator[Worker]:
        """The workers of a set of live ones."""
        return map(self._workers.__getitem__, bits_of(mask))

    def spread(self, ends: Ends) -> dict[Worker, Matched]:
        """What each worker holds on its device, by where the runs of live workers end.

        Runs are met from the shortest on. Where few end, they are written one by one. Where many do, all that
        reach so far are written, those that reach further included: their set stands in the index, is met
        again and again, and so kept written out.
        """
        found: dict[Worker, Matched] = {}
        reaching = 0
        for mask, _ in ends:
            reaching |= mask
        for mask, end in ends:
            if mask & (mask - 1) == 0:
                found[self._workers[mask]] = _on_device(end)
            elif mask.bit_count() * _FEW < reaching.bit_count():
                found.update(dict.fromkeys(self.each(mask), _on_device(end)))
            elif found:
                found.update(self._all_reaching(reaching, end))
            else:
                found = self._all_reaching(reaching, end).copy()
            reaching ^= mask
        return found

    def _all_reaching(self, mask: int, end: int) -> dict[Worker, Matched]:
        """The workers of a set, who all hold so much. It is kept, so it must not be changed."""
        expansion = self._expansions.get((mask, end))
        if expansion is None:
            if len(self._expansions) >= _EXPANSIONS_COUNT:
                self._expansions.clear()
            expansion = dict.fromkeys(self.each(mask), _on_device(end))
            self._expansions[mask, end] = expansion
        return expansion


@lru_cache(maxsize=4096)
def _on_device(blocks: int) -> Matched:
    return Matched(blocks)


def bits_of(mask: int) -> Iterator[int]:
    """The single bits of a set, lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def slot_of(bit: int) -> int:
    """The slot that a single bit stands for."""
    return bit.bit_length() - 1
