"""A queue that serves its owners in turn, and evicts from the owner with most items.

Each owner with waiting items has a lane, first in, first out. `pop` takes one item from the lane whose turn
it is; that lane then waits for its next turn behind all others. So an owner's first item waits for one turn
of each owner, whatever number of items another owner has. When the queue is full, `eviction_candidate`
returns the newest item of the longest lane. Every operation takes constant time: none searches the lanes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)
Item = TypeVar("Item", bound=Hashable)


class FairQueue(Generic[Owner, Item]):
    """Holds `size` items of any number of owners, each item once. It has no bound of its own."""

    __slots__ = ("_lanes", "_longest", "_owners_by_length", "size")

    def __init__(self) -> None:
        self._lanes: OrderedDict[Owner, OrderedDict[Item, None]] = OrderedDict()  # in order of their turns
        self._owners_by_length: dict[int, OrderedDict[Owner, None]] = {}
        self._longest = 0
        self.size = 0

    def __iter__(self) -> Iterator[Item]:
        """Yield all items, owner by owner."""
        for lane in self._lanes.values():
            yield from lane

    def push(self, owner: Owner, item: Item) -> None:
        """Append an item to the owner's lane."""
        lane = self._lanes.get(owner)
        if lane is None:
            lane = self._lanes[owner] = OrderedDict()
        lane[item] = None
        self.size += 1
        self._recount(owner, len(lane) - 1, len(lane))

    def pop(self) -> Item:
        """Remove and return the oldest item of the owner whose turn it is. Raises StopIteration if empty."""
        owner, lane = next(iter(self._lanes.items()))
        item, _ = lane.popitem(last=False)
        self._lanes.move_to_end(owner)
        self._on_taken(owner, lane)
        return item

    def remove(self, owner: Owner, item: Item) -> bool:
        """Remove an item out of turn. Return False if it is not in the queue."""
        lane = self._lanes.get(owner)
        if lane is None or item not in lane:
            return False
        del lane[item]
        self._on_taken(owner, lane)
        return True

    def eviction_candidate(self, owner: Owner) -> Item | None:
        """Return the item to evict for one more item of `owner`; None if no lane is long enough.

        That is the newest item of the longest lane, if that lane stays at least as long as the owner's lane
        becomes: two owners never evict each other's items in turns.
        """
        lane = self._lanes.get(owner)
        if self._longest <= (len(lane) if lane is not None else 0) + 1:
            return None
        crowded = next(iter(self._owners_by_length[self._longest]))
        return next(reversed(self._lanes[crowded]))

    def _on_taken(self, owner: Owner, lane: OrderedDict[Item, None]) -> None:
        self.size -= 1
        self._recount(owner, len(lane) + 1, len(lane))
        if not lane:
            del self._lanes[owner]

    def _recount(self, owner: Owner, before: int, now: int) -> None:
        """Keep `_owners_by_length` and its greatest key. Lengths change by one at a time."""
        by_length = self._owners_by_length
        if before:
            peers = by_length[before]
            del peers[owner]
            if not peers:
                del by_length[before]
        if now:
            if now not in by_length:
                by_length[now] = OrderedDict()
            by_length[now][owner] = None
        if now > self._longest or (before == self._longest and before not in by_length):
            self._longest = now
