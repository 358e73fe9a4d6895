"""The publisher: what it sends when, in which order, and what it leaves out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import anyio
import pytest

from dynamo_redis.config import EventSettings
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.events import publisher as event_publisher
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.store.streams.memory import MemoryEventStreams
from dynamo_redis.wire.event import EventBatch, PublisherId

STREAM = StreamName("dynamo", "backend", "kv_events")
PUBLISHER = PublisherId(7, 11, 0)
WAIT_S = 20.0


class Store(MemoryEventStreams):
    """Remembers each trip, and can be away: before it has stored anything, or before it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.trips: list[list[EventBatch]] = []
        self.is_away = False
        self.attempt_count = 0
        self.loses_answers = False
        self.open = asyncio.Event()
        self.open.set()
        self.under_way = 0
        self.is_wanted = False
        self.looks: list[asyncio.Event] = []
        """Looks that have been answered wait for these before the answer arrives."""
        self.look_count = 0

    async def append(
        self, stream: StreamName, entries: Sequence[NewEntry], *, max_age_s: float | None = None
    ) -> None:
        assert self.under_way == 0, "two trips at once"
        self.under_way += 1
        try:
            await self.open.wait()
            self.attempt_count += 1
            if self.is_away:
                raise StoreUnavailable("away")
            self.trips.append([EventBatch.from_bytes(entry.content) for entry in entries])
            assert [entry.event_count for entry in entries] == [len(b.events) for b in self.trips[-1]]
            if self.loses_answers:
                raise StoreUnavailable("no answer")
        finally:
            self.under_way -= 1

    async def publish(self, topic: StreamName, message: bytes) -> int:
        await self.append(topic, [NewEntry(message, len(EventBatch.from_bytes(message).events))])
        return 1

    async def keep_if_wanted(self, stream: StreamName) -> bool:
        self.look_count += 1
        is_wanted = self.is_wanted
        for look in self.looks:
            await look.wait()
        return is_wanted

    @property
    def batches(self) -> list[EventBatch]:
        return [batch for trip in self.trips for batch in trip]


class Follower:
    """Applies batches as every reader does: each event once, in order; counts gaps."""

    def __init__(self) -> None:
        self.applied: list[Any] = []
        self.next_sequence = 0
        self.duplicate_count = 0
        self.gaps: list[range] = []

    def apply(self, batch: EventBatch) -> None:
        if batch.first_sequence > self.next_sequence:
            self.gaps.append(range(self.next_sequence, batch.first_sequence))
            self.next_sequence = batch.first_sequence
        new = batch.events[self.next_sequence - batch.first_sequence :]
        self.duplicate_count += len(batch.events) - len(new)
        self.applied += new
        self.next_sequence = max(self.next_sequence, batch.next_sequence)


Publish = Callable[..., EventPublisher]


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
async def publisher_of(store: Store) -> AsyncIterator[Publish]:
    """Makes publishers, not started; closes them."""
    made: list[EventPublisher] = []

    def make(
        *,
        durable: bool = True,
        only_while_read: bool = False,
        trips_per_s: float | None = None,
        **settings: Any,
    ) -> EventPublisher:
        chosen = EventSettings.load(**{"event_linger_s": 0.0, **settings})
        options: dict[str, Any] = {"durable": durable, "only_while_read": only_while_read}
        if trips_per_s is not None:
            options["trips_per_s"] = lambda: trips_per_s
        made.append(EventPublisher(store, STREAM, PUBLISHER, chosen, **options))
        return made[-1]

    yield make
    store.is_away = store.loses_answers = False
    store.open.set()
    for publisher in made:
        await publisher.aclose()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(WAIT_S):
        while not condition():
            await anyio.sleep(0.001)


async def test_events_of_one_linger_go_together(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(event_linger_s=0.01)
    await publisher.start()
    assert [publisher.publish(n) for n in range(3)] == [0, 1, 2]
    assert publisher.queued_count == 3
    assert store.trips == []
    await until(lambda: store.trips)
    (batch,) = store.batches
    assert (batch.topic, batch.publisher, batch.first_sequence) == ("kv_events", PUBLISHER, 0)
    assert batch.events == [0, 1, 2]
    await until(lambda: publisher.queued_count == 0)


async def test_a_full_batch_does_not_linger(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(event_linger_s=60.0, event_batch_count=4)
    await publisher.start()
    for n in range(4):
        publisher.publish(n)
    await until(lambda: store.trips)
    publisher.publish(b"x" * event_publisher.BATCH_BYTES)
    await until(lambda: len(store.trips) == 2)
    assert [len(batch.events) for batch in store.batches] == [4, 1]


async def test_next_trip_takes_events_that_came_meanwhile(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(event_batch_count=4)
    await publisher.start()
    store.open.clear()
    publisher.publish(0)
    await until(lambda: store.under_way)
    for n in range(1, 100):
        publisher.publish(n)
    assert publisher.queued_count == 100
    store.open.set()
    assert await publisher.flush(WAIT_S)
    sizes = [[len(batch.events) for batch in trip] for trip in store.trips]
    assert sizes == [[1], [4] * 8, [4] * 8, [4] * 8, [3]]
    assert [event for batch in store.batches for event in batch.events] == list(range(100))
    assert [batch.first_sequence for batch in store.batches] == [0, *range(1, 100, 4)]


async def test_events_before_the_start_are_sent(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of()
    publisher.publish("early")
    await publisher.start()
    await until(lambda: store.batches)
    assert store.batches[0].events == ["early"]


async def test_an_event_may_change_after_it_was_published(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of()
    await publisher.start()
    event = [1, 2]
    publisher.publish(event)
    event.append(3)
    await publisher.flush(WAIT_S)
    assert store.batches[0].events == [[1, 2]]


async def test_unpackable_event_takes_no_sequence(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of()
    with pytest.raises(TypeError):
        publisher.publish(object())
    with pytest.raises(OverflowError):
        publisher.publish([1, 1 << 70])
    assert publisher.publish("good") == 0
    await publisher.start()
    await publisher.flush(WAIT_S)
    assert [batch.events for batch in store.batches] == [["good"]]


async def test_lost_answers_make_duplicates_and_never_disorder(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(event_batch_count=3)
    await publisher.start()
    for n in range(60):
        publisher.publish(n)
        store.loses_answers = n % 7 == 0
        store.is_away = n % 11 == 0
        await asyncio.sleep(0)
    store.loses_answers = True
    await until(lambda: len(store.trips) >= 3)
    store.is_away = store.loses_answers = False
    assert await publisher.flush(WAIT_S)
    follower = Follower()
    for batch in store.batches:
        follower.apply(batch)
    assert follower.applied == list(range(60))
    assert follower.duplicate_count
    assert not follower.gaps


async def test_an_overflow_is_a_gap_that_shows_without_further_events(
    store: Store, publisher_of: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    publisher = publisher_of(event_queue_count=50, event_batch_count=10)
    await publisher.start()
    store.is_away = True
    assert [publisher.publish(n) for n in range(80)] == list(range(80))
    await until(lambda: "are not sent" in caplog.text)
    assert publisher.publish(80) == 80
    assert (publisher.queued_count, publisher.left_out_count, publisher.next_sequence) == (50, 31, 81)
    store.is_away = False
    await until(lambda: store.batches and store.batches[-1].next_sequence == 81)
    follower = Follower()
    for batch in store.batches:
        follower.apply(batch)
    assert follower.applied == list(range(50))
    assert follower.gaps == [range(50, 81)]
    publisher.publish(81)
    assert await publisher.flush(WAIT_S)
    follower.apply(store.batches[-1])
    assert follower.applied[-1] == 81
    assert caplog.text.count("queue of events is full") == 1
    assert caplog.text.count("are sent again") == 1


def has_tried(store: Store, before: int) -> bool:
    return store.attempt_count > before


async def test_recurring_failures_are_logged_once(
    store: Store, publisher_of: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    publisher = publisher_of()
    await publisher.start()
    for round_number in range(4):
        store.is_away = True
        before = store.attempt_count
        publisher.publish(round_number)
        await until(partial(has_tried, store, before))
        store.is_away = False
        assert await publisher.flush(WAIT_S)
    assert caplog.text.count("are not sent") == caplog.text.count("are sent again") == 1


async def test_failure_is_not_logged_while_no_event_waits(
    store: Store, publisher_of: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = publisher_of()
    publisher._silence_s = 0.01
    await publisher.start()
    publisher.publish(1)
    assert await publisher.flush(WAIT_S)
    store.is_away = True
    tries = store.attempt_count
    await until(lambda: store.attempt_count > tries + 1)
    assert not caplog.records


async def test_the_queue_is_bounded_in_bytes(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(event_queue_size_bytes=10_000)
    await publisher.start()
    store.is_away = True
    for _ in range(100):
        publisher.publish(b"x" * 1000)
        await asyncio.sleep(0)
    assert publisher.queued_count == 10
    assert publisher.left_out_count == 90


async def test_none_is_taken_in_again_before_the_gap_can_be_shown(
    store: Store, publisher_of: Publish
) -> None:
    publisher = publisher_of(event_queue_count=20, event_batch_count=1)
    await publisher.start()
    store.open.clear()
    for n in range(21):
        publisher.publish(n)
        await asyncio.sleep(0)
    follower = Follower()
    for n in range(21, 200):
        store.open.set()
        publisher.publish(n)
        await asyncio.sleep(0)
    assert await publisher.flush(WAIT_S)
    for batch in store.batches:
        follower.apply(batch)
    assert follower.next_sequence == 200
    missed = [number for gap in follower.gaps for number in gap]
    assert sorted(follower.applied + missed) == list(range(200))
    assert len(missed) == publisher.left_out_count > 0


async def test_silent_publisher_sends_its_next_sequence(
    store: Store, publisher_of: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_publisher, "SILENCE_S", 0.01)
    monkeypatch.setattr(event_publisher, "TOPIC_SILENCE_S", 0.01)
    for durable in (True, False):
        store.trips.clear()
        publisher = publisher_of(durable=durable)
        await publisher.start()
        await anyio.sleep(0.03)
        assert store.trips == []  # nothing to say yet
        publisher.publish("one")
        await until(lambda: len(store.trips) >= 3)
        await publisher.aclose()
        assert [batch.events for batch in store.batches[:3]] == [["one"], [], []]
        assert {batch.next_sequence for batch in store.batches} == {1}


async def test_flush_and_close_are_bounded(
    store: Store, publisher_of: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_publisher, "CLOSE_S", 0.05)
    publisher = publisher_of()
    await publisher.start()
    store.open.clear()
    publisher.publish("stuck")
    assert not await publisher.flush(0.01)
    with anyio.fail_after(WAIT_S):
        await publisher.aclose()
        await publisher.aclose()
    assert publisher.publish("late") == 1
    assert (publisher.left_out_count, store.trips) == (1, [])


async def test_closing_sends_waiting_events(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(event_linger_s=60.0)
    await publisher.start()
    publisher.publish("last")
    await publisher.aclose()
    assert [batch.events for batch in store.batches] == [["last"]]


# --------------------------------------------------------------------------- rest


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_publisher, "LOOK_S", 0.0)


async def test_a_publisher_without_readers_rests(
    store: Store, publisher_of: Publish, looks_at_once: None
) -> None:
    publisher = publisher_of(only_while_read=True)
    await publisher.start()
    publisher.publish("unheard")
    await until(lambda: publisher.is_resting)
    assert [publisher.publish(number) for number in range(3)] == [1, 2, 3]
    assert await publisher.flush(WAIT_S)
    assert (store.trips, publisher.queued_count, store.look_count) == ([], 0, 1)
    store.is_wanted = True
    publisher.wake()
    assert publisher.publish("heard") == 4
    assert await publisher.flush(WAIT_S)
    (batch,) = store.batches
    assert (batch.first_sequence, batch.events) == (4, ["heard"])


async def test_a_resting_publisher_looks_for_readers(
    store: Store, publisher_of: Publish, looks_at_once: None
) -> None:
    """One that has missed a reader's coming shows the gap."""
    publisher = publisher_of(only_while_read=True)
    publisher._silence_s = 0.01
    await publisher.start()
    publisher.publish("unheard")
    await until(lambda: publisher.is_resting)
    publisher.publish("unheard")
    store.is_wanted = True
    await until(lambda: store.trips)
    assert (store.batches[0].first_sequence, store.batches[0].events) == (2, [])


async def test_an_answer_from_before_the_wake_counts_not(
    store: Store, publisher_of: Publish, looks_at_once: None
) -> None:
    publisher = publisher_of(only_while_read=True)
    await publisher.start()
    answer = asyncio.Event()
    store.looks.append(answer)
    publisher.publish("a")
    await until(lambda: store.look_count)
    store.is_wanted = True
    publisher.wake()  # the server had answered that there is no reader
    publisher.publish("b")
    answer.set()
    assert await publisher.flush(WAIT_S)
    assert [event for batch in store.batches for event in batch.events] == ["a", "b"]
    assert not publisher.is_resting


async def test_rest_ends_a_round_trip(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of()
    await publisher.start()
    store.is_away = True
    publisher.publish("lost")
    await until(lambda: store.attempt_count)
    publisher.rest()
    store.is_away = False
    publisher.wake()
    publisher.publish("told")
    assert await publisher.flush(WAIT_S)
    assert store.batches[-1].events == ["told"]
    assert publisher.queued_count == 0


async def test_publisher_at_rest_sends_nothing(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of()
    publisher._silence_s = 0.01
    publisher.rest()
    await publisher.start()
    publisher.publish("unheard")
    await anyio.sleep(0.05)
    assert store.trips == []


# --------------------------------------------------------------------------- the pace


async def test_trips_after_a_burst_wait_for_the_pace(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(trips_per_s=0.001)
    await publisher.start()
    for number in range(event_publisher.BURST_COUNT):
        publisher.publish(number)
        await until(lambda: len(store.trips) == publisher.next_sequence)
    for number in range(5):
        publisher.publish(number)
        await asyncio.sleep(0.01)
    assert len(store.trips) == event_publisher.BURST_COUNT
    assert await publisher.flush(WAIT_S)
    assert [len(batch.events) for batch in store.batches[event_publisher.BURST_COUNT :]] == [5]


async def test_full_batch_does_not_wait_for_the_pace(store: Store, publisher_of: Publish) -> None:
    publisher = publisher_of(trips_per_s=0.001, event_batch_count=4)
    await publisher.start()
    for number in range(4 * (event_publisher.BURST_COUNT + 10)):
        publisher.publish(number)
    await until(lambda: sum(len(batch.events) for batch in store.batches) == publisher.next_sequence)


async def test_event_waits_a_share_of_the_pace_at_most(store: Store, publisher_of: Publish) -> None:
    """Full batches, which do not wait, are no debt of later ones."""
    publisher = publisher_of(trips_per_s=1.0, event_batch_count=2)
    await publisher.start()
    for number in range(2000):
        publisher.publish(number)
        if number % 16 == 15:
            await publisher.flush(WAIT_S)
    publisher.publish("last")
    await until(lambda: store.batches[-1].events == ["last"])
