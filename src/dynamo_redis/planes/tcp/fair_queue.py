"""A queue that serves its owners in turn, and asks the most crowded one to make room.

Each owner has a lane, first in, first out, for as long as something of it waits. `pop` takes one item from
the lane whose turn it is, which then waits for its next turn behind all others: however much one owner puts
in, another's first item waits for one turn of each owner. When the queue has no room, `to_make_room` names
what to throw out: the newest item of the longest lane. Nothing here searches: every operation takes the
same time however many owners and items there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)
Item = TypeVar("Item", bound=Hashable)


class FairQueue(Generic[Owner, Item]):
    """`size` items of any number of owners. An item may be in it once. It has no bound of its own."""

    __slots__ = ("_lanes", "_longest", "_owners_by_length", "size")

    def __init__(self) -> None:
        self._lanes: OrderedDict[Owner, OrderedDict[Item, None]] = OrderedDict()  # in order of their turns
        self._owners_by_length: dict[int, OrderedDict[Owner, None]] = {}
        self._longest = 0
        self.size = 0

    def __iter__(self) -> Iterator[Item]:
        """All items, one owner's after the other's."""
        for lane in self._lanes.values():
            yield from lane

    def push(self, owner: Owner, item: Item) -> None:
        """Put an item behind the owner's others."""
        lane = self._lanes.get(owner)
        if lane is None:
            lane = self._lanes[owner] = OrderedDict()
        lane[item] = None
        self.size += 1
        self._recount(owner, len(lane) - 1, len(lane))

    def pop(self) -> Item:
        """Take the oldest item of the owner whose turn it is. Raises StopIteration if there is none."""
        owner, lane = next(iter(self._lanes.items()))
        item, _ = lane.popitem(last=False)
        self._lanes.move_to_end(owner)
        self._on_taken(owner, lane)
        return item

    def remove(self, owner: Owner, item: Item) -> bool:
        """Take an item out of turn. False if it is not there."""
        lane = self._lanes.get(owner)
        if lane is None or item not in lane:
            return False
        del lane[item]
        self._on_taken(owner, lane)
        return True

    def to_make_room(self, owner: Owner) -> Item | None:
        """The item that should give its place to one more of `owner`; None if nobody has more than it would.

        That is the newest item of the longest lane, provided that lane stays no shorter than the owner's
        becomes: two owners never take the same place from each other in turns.
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
