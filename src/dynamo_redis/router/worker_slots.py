"""Workers as bits: each has a slot, so that a set of workers is one integer. Pure.

The slot of a worker that is gone is *dead*: its bit may stand in many sets still, and means nobody. Only when
it stands in none any more is the slot given to another worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dynamo_redis.router.base import Worker

_EXPANSIONS_COUNT = 256
"""Sets that are kept as workers, too. Of 256 workers each takes some 10 KB."""


class WorkerSlots:
    """Which bit is whose. `live` is the set of all workers."""

    def __init__(self, workers: Iterable[Worker | None] = ()) -> None:
        """`workers` by slot; None where a slot is free."""
        self._workers = list(workers)
        self._bits = {worker: 1 << slot for slot, worker in enumerate(self._workers) if worker is not None}
        self._free = [slot for slot, worker in enumerate(self._workers) if worker is None]
        self._expansions: dict[int, dict[Worker, None]] = {}
        self.live = sum(self._bits.values())
        self.dead = 0

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def width(self) -> int:
        """How many slots there are: live, dead and free."""
        return len(self._workers)

    @property
    def workers(self) -> list[Worker]:
        """All workers."""
        return list(self._bits)

    def by_slot(self) -> list[Worker | None]:
        """All workers, by slot; None where there is none."""
        return list(self._workers)

    def find(self, worker: Worker) -> int:
        """A worker's bit, 0 if it has none."""
        return self._bits.get(worker, 0)

    def take(self, worker: Worker) -> int:
        """A worker's bit; a new worker gets a free slot."""
        if bit := self._bits.get(worker):
            return bit
        if self._free:
            slot = self._free.pop()
            self._workers[slot] = worker
        else:
            slot = len(self._workers)
            self._workers.append(worker)
        bit = self._bits[worker] = 1 << slot
        self.live |= bit
        return bit

    def kill(self, worker: Worker) -> int:
        """Make a worker's slot dead, and return its bit; 0 if it had none."""
        bit = self._bits.pop(worker, 0)
        if bit:
            self._workers[slot_of(bit)] = None
            self.live ^= bit
            self.dead |= bit
            self._expansions.clear()
        return bit

    def release(self, dead: int) -> None:
        """These dead bits stand in no set any more."""
        self.dead &= ~dead
        self._free.extend(map(slot_of, bits_of(dead)))

    def each(self, mask: int) -> Iterator[Worker]:
        """The workers of a set of live ones. For few."""
        for bit in bits_of(mask):
            worker = self._workers[slot_of(bit)]
            assert worker is not None
            yield worker

    def expand(self, mask: int) -> dict[Worker, None]:
        """The workers of a set of live ones, as keys: it is kept, so don't change it. For many.

        A dict made of another takes over the hashes of its keys, where a list's would be computed anew.
        """
        workers = self._expansions.get(mask)
        if workers is None:
            if len(self._expansions) >= _EXPANSIONS_COUNT:
                self._expansions.clear()
            workers = self._expansions[mask] = dict.fromkeys(self.each(mask))
        return workers


def bits_of(mask: int) -> Iterator[int]:
    """The single bits of a set, lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def slot_of(bit: int) -> int:
    """The slot that a single bit stands for."""
    return bit.bit_length() - 1
