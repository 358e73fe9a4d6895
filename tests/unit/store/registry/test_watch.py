"""Views, watches and the fan-out, without a server."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_redis.store.base import Delete, DeleteCause, Put, Record, Revision, Snapshot
from dynamo_redis.store.registry.change_log import Change, Position
from dynamo_redis.store.registry.watch import EVENT_BYTES, Fanout, QueueWatch

START = Position("incarnation", Revision("0-1"), "op")


def put(number: int, key: str, value: bytes = b"") -> Change:
    revision = Revision(f"{number}-0")
    record = Record(key, value, revision, revision, 1, None)
    return Change(revision, "p", key, None, f"op{number}", (Revision(f"{number - 1}-0"), "op"), record)


def delete(number: int, key: str) -> Change:
    revision = Revision(f"{number}-0")
    return Change(revision, "d", key, None, f"op{number}", (Revision(f"{number - 1}-0"), "op"))


def snapshot(*changes: Change) -> Snapshot:
    return Snapshot(tuple(change.record for change in changes if change.record), changes[-1].revision)


@pytest.fixture
async def fanout() -> Fanout:
    return Fanout()


async def begin(fanout: Fanout, prefix: str) -> QueueWatch:
    """A watch whose first state has been read."""
    watch = fanout.watch(prefix)
    if not watch.view.is_loaded:
        watch.view.begin_load()
        assert watch.view.finish_load(Snapshot((), START.revision), START)
    assert (await anext(watch)).resync is None
    return watch


async def test_change_reaches_exactly_the_views_of_its_prefixes(fanout: Fanout) -> None:
    watches = {prefix: await begin(fanout, prefix) for prefix in ("", "a", "a/", "a/1", "b/", "a/1/x/y")}
    fanout.follow([put(1, "a/1")])
    seen = {prefix for prefix, watch in watches.items() if watch._queue}
    assert seen == {"", "a", "a/", "a/1"}
    await watches["a/"].aclose()
    fanout.follow([put(2, "a/2")])
    assert "a/" not in fanout.views
    assert len(watches["a"]._queue) == 2
    assert watches["b/"].view.position == Position("incarnation", Revision("2-0"), "op2")


async def test_long_values_fill_a_queue_sooner(fanout: Fanout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_redis.store.registry.watch.QUEUE_EVENTS_COUNT", 100)
    watch = await begin(fanout, "")
    for number in range(1, 5):
        fanout.follow([put(number, "k", b"v" * 30 * EVENT_BYTES)])
    batch = await anext(watch)
    assert batch.resync is not None
    assert [event.record.mod_revision for event in batch.events if isinstance(event, Put)] == ["4-0"]
    fanout.follow([put(5, "k", b"v" * 200 * EVENT_BYTES)])
    assert (await anext(watch)).resync is None, "one that is alone is no backlog"


async def test_difference_for_a_stalled_consumer_stays_small(
    fanout: Fanout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_redis.store.registry.watch.QUEUE_EVENTS_COUNT", 10)
    watch = await begin(fanout, "")
    fanout.follow([put(1, "stays", b"1")])
    for number in range(2, 5000, 2):
        fanout.follow([put(number, f"k{number}")])
        fanout.follow([delete(number + 1, f"k{number}")])
    assert watch._reported is not None
    assert len(watch._reported) < 100
    batch = await anext(watch)
    assert [event.record.key for event in batch.events if isinstance(event, Put)] == ["stays"]


async def test_difference_counts_from_the_reported_records(fanout: Fanout) -> None:
    watch, other = await begin(fanout, ""), await begin(fanout, "")
    fanout.follow([put(1, "a", b"1"), put(2, "b", b"1"), put(3, "c", b"1")])
    await anext(watch)  # the other one has seen nothing of it
    fanout.follow([delete(4, "a")])
    after = Position("incarnation", Revision("9-0"), "op9")
    fanout.views[""].replace(snapshot(put(8, "b", b"2"), put(9, "c", b"1")), after, "lost")
    batch = await anext(watch)
    assert batch.resync == "lost"
    assert batch.events[0] == Delete("a", Revision("9-0"), DeleteCause.RESYNC)
    assert [event.record.key for event in batch.events[1:] if isinstance(event, Put)] == ["b"]
    batch = await anext(other)
    assert [event.record.key for event in batch.events if isinstance(event, Put)] == ["b", "c"]
    assert not [event for event in batch.events if isinstance(event, Delete)], "it never saw a"


async def test_changes_of_another_history_are_not_put_on_a_snapshot(fanout: Fanout) -> None:
    watch = fanout.watch("")
    view = watch.view
    view.begin_load()
    fanout.follow([put(7, "lost")])
    # The snapshot is of a server that never had the entry before it.
    assert not view.finish_load(Snapshot((), Revision("5-0")), Position("incarnation", Revision("5-0"), "op"))
    view.begin_load()
    assert view.finish_load(Snapshot((), Revision("5-0")), Position("incarnation", Revision("5-0"), "op"))
    assert (await asyncio.wait_for(anext(watch), 30)).events == ()
