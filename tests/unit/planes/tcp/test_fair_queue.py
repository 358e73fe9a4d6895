"""The fair queue, against a model that searches all items."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.planes.frames.fair_queue import FairQueue

OWNERS = "abcd"


class Searching:
    """A queue of the same behaviour that searches all items."""

    def __init__(self) -> None:
        self.lanes: dict[str, list[int]] = {}  # in the order of their turns

    def push(self, owner: str, item: int) -> None:
        self.lanes.setdefault(owner, []).append(item)

    def pop(self) -> int:
        owner = next(iter(self.lanes))
        lane = self.lanes.pop(owner)
        item, *rest = lane
        if rest:
            self.lanes[owner] = rest
        return item

    def remove(self, owner: str, item: int) -> bool:
        lane = self.lanes.get(owner, [])
        if item not in lane:
            return False
        lane.remove(item)
        if not lane:
            del self.lanes[owner]
        return True

    def may_make_room(self, owner: str) -> set[int]:
        longest = max(map(len, self.lanes.values()), default=0)
        if longest <= len(self.lanes.get(owner, [])) + 1:
            return set()
        return {lane[-1] for lane in self.lanes.values() if len(lane) == longest}


@given(st.lists(st.tuples(st.sampled_from(["push", "push", "pop", "remove"]), st.sampled_from(OWNERS))))
def test_queue_equals_its_model(steps: list[tuple[str, str]]) -> None:
    queue: FairQueue[str, int] = FairQueue()
    model, numbers = Searching(), count()
    for step, owner in steps:
        if step == "push":
            number = next(numbers)
            queue.push(owner, number)
            model.push(owner, number)
        elif step == "pop" and model.lanes:
            assert queue.pop() == model.pop()
        elif step == "remove":
            lane = model.lanes.get(owner, [-1])
            item = lane[len(lane) // 2]
            assert queue.remove(owner, item) == model.remove(owner, item)
        waiting = [item for lane in model.lanes.values() for item in lane]
        assert list(queue) == waiting
        assert queue.size == len(waiting)
        for asking in OWNERS:
            candidates = model.may_make_room(asking)
            chosen = queue.eviction_candidate(asking)
            assert chosen in candidates if candidates else chosen is None


def test_owner_that_leaves_and_returns_waits_for_its_turn() -> None:
    queue: FairQueue[str, int] = FairQueue()
    for number in range(4):
        queue.push("crowd", number)
    queue.push("single", 10)
    assert [queue.pop(), queue.pop()] == [0, 10]
    queue.push("single", 11)
    assert [queue.pop() for _ in range(4)] == [1, 11, 2, 3]


def test_owners_of_equal_length_do_not_evict_each_other() -> None:
    queue: FairQueue[str, int] = FairQueue()
    queue.push("a", 1)
    queue.push("a", 2)
    assert queue.eviction_candidate("b") == 2
    queue.push("b", 3)
    assert queue.eviction_candidate("b") is None
    assert queue.eviction_candidate("a") is None


def test_empty_queue_holds_nothing() -> None:
    queue: FairQueue[str, int] = FairQueue()
    for number in range(100):
        queue.push(str(number), number)
    for number in range(0, 100, 2):
        queue.remove(str(number), number)
    while queue.size:
        queue.pop()
    assert list(queue) == []
    assert not queue._lanes
    assert not queue._owners_by_length
    with pytest.raises(StopIteration):
        queue.pop()
