"""Suite `index` measures what its rows say, on chats that keep the promises of engines."""

from __future__ import annotations

from benchmarks.index.__main__ import BOUNDS, GROUPS
from benchmarks.index.choice import Router
from benchmarks.index.sides import indexed, to_batches
from benchmarks.index.workload import Chats, Event

from dynamo_redis.router.base import Matched, Worker

CAPACITY = 300


def said(chats: Chats, blocks: int = 6000) -> list[Event]:
    return list(chats.events(blocks))


def test_each_row_is_measured_once() -> None:
    assert [name for names, _ in GROUPS for name in names] == list(BOUNDS)


def test_equal_seeds_have_equal_chats() -> None:
    assert said(Chats(1, 4, CAPACITY)) == said(Chats(1, 4, CAPACITY)) != said(Chats(2, 4, CAPACITY))


def test_holder_of_a_block_holds_the_blocks_before_it() -> None:
    """Leaps over a prompt, and the rival's tree, rely on that."""
    parents: dict[int, int | None] = {}
    held: list[set[int]] = [set() for _ in range(4)]
    for event in said(Chats(3, 4, CAPACITY)):
        mine = held[event.worker]
        if event.stored:
            before = event.parent
            for block in event.blocks:
                assert parents.setdefault(block.sequence, before) == before
                assert before is None or before in mine
                mine.add(block.sequence)
                before = block.sequence
        else:
            mine.difference_update(block.sequence for block in event.blocks)
            assert not {block for block in mine if parents[block] is not None and parents[block] not in mine}
    assert all(CAPACITY / 2 < len(blocks) <= CAPACITY for blocks in held)


def test_our_side_applies_all_events() -> None:
    chats = Chats(3, 4, CAPACITY)
    events = said(chats)
    for size in (1, 32):
        index = indexed(to_batches(events, size))
        for worker in range(4):
            held: set[int] = set()
            for event in events:
                if event.worker == worker:
                    change = held.update if event.stored else held.difference_update
                    change(block.sequence for block in event.blocks)
            assert index.blocks_of(Worker(worker))[0] == held


def test_documents_are_read_up_to_different_points() -> None:
    chats = Chats(3, 8, CAPACITY)
    ((blocks, read),) = chats.documents(1, 200)
    index = indexed(to_batches(read))
    found = index.find([block.sequence for block in blocks])
    assert sorted(found.values()) == sorted(Matched(len(event.blocks)) for event in read)


def test_choice_leaves_no_load_behind() -> None:
    router = Router(3)
    before = dict(router.book.loads())
    router.choose_all()
    assert router.book.loads() == before
