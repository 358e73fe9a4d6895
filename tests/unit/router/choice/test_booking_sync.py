"""The exchange of bookings between routers, also when messages are lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dynamo_redis.config import EventSettings
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.events.router_record import RouterRecord
from dynamo_redis.router.base import CostWeights, RoutingRequest, Worker, WorkerLoad
from dynamo_redis.router.choice.booking import BookingChooser
from dynamo_redis.router.choice.booking_sync import LEASE_S, RENEW_S, BookingSync, owner_name
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.selector import Selector
from dynamo_redis.router.choice.waiting_line import WaitingLines
from dynamo_redis.store.base import Delete, DeleteCause, Put, Record, Revision, WatchBatch
from dynamo_redis.store.event_base import Entry, EntryId, EventTail, NewEntry, StreamName
from dynamo_redis.store.registry.memory import MemoryRegistry, MemoryServer
from dynamo_redis.store.streams.memory import MemoryEventStreams
from dynamo_redis.wire.event import EventBatch, PublisherId

WORKER = Worker(7, 1)
IDLE = WorkerLoad(0, 0, 0)
STREAM = StreamName("dynamo", "backend", "active_sequences_events")
RECORD = b'{"version": 1}'


class _Heard:
    """A publisher of which `publish` is another function."""

    def __init__(self, publisher: EventPublisher, publish: Callable[[Any], int]) -> None:
        self._publisher = publisher
        self.publish = publish

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)


class HeldClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class Router:
    """A router's book and its sync, with what it publishes taken from its publisher's hands."""

    def __init__(
        self,
        epoch: int,
        clock: HeldClock,
        streams: MemoryEventStreams | None = None,
        registry: MemoryRegistry | None = None,
    ) -> None:
        self.publisher = PublisherId(1, epoch, 0)
        self.owner = owner_name(self.publisher)
        self.book = LoadBook()
        self.clock = clock
        self.sync = BookingSync(
            streams or MemoryEventStreams(),
            registry or MemoryRegistry(MemoryServer()),
            "dynamo",
            "backend",
            self.publisher,
            EventSettings.load(),
            self.book,
            lambda: self.chooser.bookings.values(),
            clock=clock,
        )
        self.said: list[Any] = []
        self.sync._publisher = _Heard(self.sync._publisher, self._say)  # type: ignore[assignment]
        self.chooser = BookingChooser(
            self.owner,
            lambda hashes: {},
            self,
            self.book,
            Selector(random.Random(1)),
            WaitingLines(1),
            block_size=16,
            weights=CostWeights(),
            listener=self.sync,
            clock=clock,
        )

    def _say(self, event: Any) -> int:
        self.said.append(event)
        return len(self.said) - 1

    def candidates(self, among: object, excluded: object) -> list[Worker]:
        return [WORKER]

    def without_busy(self, workers: Any, book: LoadBook, busy: object) -> Any:
        return workers

    async def book_one(
        self, request_id: str, deadline_s: float = 600.0, *, hashes: Sequence[int] | None = None
    ) -> None:
        """40 tokens: two whole blocks, by default of this request alone, and a part of one."""
        own = (hash(request_id) & 0xFFFFFF) << 1
        named = [own, own + 1] if hashes is None else hashes
        tokens = 16 * len(named) + 8
        await self.chooser.choose(RoutingRequest(request_id, named, tokens, self.clock.now + deadline_s))

    def messages(self) -> Iterator[Entry]:
        """Return the messages that it has sent since the last call, an event an entry."""
        said, self.said = self.said, []
        for event in said:
            batch = EventBatch("active_sequences_events", self.publisher, 0, 0, [event])
            yield Entry(EntryId("1-0"), batch.to_bytes())

    def load(self) -> WorkerLoad:
        return self.book.load(WORKER)


def tell(teller: Router, hearer: Router) -> None:
    for entry in teller.messages():
        hearer.sync.apply(entry)


@pytest.fixture
def clock() -> HeldClock:
    return HeldClock()


@pytest.fixture
def one(clock: HeldClock) -> Router:
    return Router(1, clock)


@pytest.fixture
def other(clock: HeldClock) -> Router:
    return Router(2, clock)


def beats(teller: Router, hearer: Router, for_s: float) -> None:
    """Time goes on, with all renewals delivered."""
    for _ in range(round(for_s / RENEW_S)):
        teller.clock.now += RENEW_S
        teller.sync.renew()
        tell(teller, hearer)
        hearer.book.expire(hearer.clock.now)


async def test_booking_reaches_the_other_router(one: Router, other: Router) -> None:
    await one.book_one("r")
    tell(one, other)
    assert other.load() == WorkerLoad(40, 3, 1) == one.load()
    one.chooser.prefill_done("r")
    tell(one, other)
    assert other.load() == WorkerLoad(0, 3, 1)
    one.chooser.free("r")
    tell(one, other)
    assert other.load() == IDLE


async def test_ones_own_messages_count_for_nothing(one: Router) -> None:
    await one.book_one("r")
    said = list(one.messages())
    one.chooser.free("r")
    for entry in [*said, *one.messages(), *said]:  # they come when all is over
        one.sync.apply(entry)
    assert one.load() == IDLE


async def test_a_free_that_is_lost_leaves_no_phantom_load(one: Router, other: Router) -> None:
    await one.book_one("r")
    tell(one, other)
    one.chooser.free("r")
    list(one.messages())  # it reaches no router
    assert other.load().request_count == 1
    beats(one, other, LEASE_S)
    assert other.load() == IDLE


async def test_a_request_under_way_is_known_for_as_long_as_it_runs(one: Router, other: Router) -> None:
    await one.book_one("r", deadline_s=300)
    tell(one, other)
    one.chooser.prefill_done("r")
    list(one.messages())  # lost: the next renewal says it
    beats(one, other, 4 * LEASE_S)
    assert other.load() == WorkerLoad(0, 3, 1)
    other.clock.now += LEASE_S
    other.book.expire(other.clock.now)
    assert other.load() == IDLE  # nothing was heard of it for too long


async def test_an_add_that_is_lost_is_made_good(one: Router, other: Router) -> None:
    await one.book_one("r")
    list(one.messages())
    assert other.load() == IDLE
    beats(one, other, RENEW_S)
    assert other.load() == WorkerLoad(40, 3, 1)


async def test_a_booking_never_outlives_its_request(one: Router, other: Router) -> None:
    await one.book_one("r", deadline_s=5)
    tell(one, other)
    other.clock.now += 5
    other.book.expire(other.clock.now)
    assert other.load() == IDLE


async def test_many_requests_are_renewed_in_pieces(one: Router, other: Router) -> None:
    for number in range(600):
        await one.book_one(f"r{number}")
    list(one.messages())
    one.sync.renew()
    assert [len(event[1]) for event in one.said] == [256, 256, 88]
    tell(one, other)
    assert other.load().request_count == 600


SYSTEM = list(range(1000, 1100))


async def test_shared_blocks_count_once_through_sync(one: Router, other: Router) -> None:
    """By single messages, by renewals, and with requests of the router that hears of them."""
    for number in range(5):
        await one.book_one(f"r{number}", hashes=[*SYSTEM, number])
    assert one.load() == WorkerLoad(5 * 1624, 100 + 5 + 5, 5)
    tell(one, other)
    assert other.load() == one.load()
    late = Router(3, one.clock)
    await late.book_one("own", hashes=[*SYSTEM, 77])
    beats(one, late, RENEW_S)
    assert late.load() == WorkerLoad(6 * 1624, 100 + 6 + 6, 6)
    for number in range(4):
        one.chooser.free(f"r{number}")
    tell(one, late)
    assert late.load() == WorkerLoad(2 * 1624, 100 + 2 + 2, 2)


async def test_renewals_name_shared_blocks_once(one: Router) -> None:
    for number in range(200):
        await one.book_one(f"r{number}", hashes=[*SYSTEM, number])
    list(one.messages())
    one.sync.renew()
    [entry] = one.messages()
    assert len(entry.content) < 200 * 60 + 8 * len(SYSTEM)


async def test_renewals_of_long_prompts_are_cut_into_pieces(one: Router, other: Router) -> None:
    for number in range(6):
        await one.book_one(f"r{number}", hashes=range(number << 20, (number << 20) + 5000))
    list(one.messages())
    one.sync.renew()
    assert [len(event[1]) for event in one.said] == [2, 2, 2]
    tell(one, other)
    assert other.load() == one.load()


async def test_a_booking_without_names_counts_whole(one: Router, other: Router) -> None:
    """As routers of an older release tell of theirs."""
    batch = EventBatch(
        "active_sequences_events",
        one.publisher,
        0,
        0,
        [["add", "a", 7, 1, 40, 3, 600.0], ["active", [["b", 7, 1, 40, 3, 600.0]]]],
    )
    other.sync.apply(Entry(EntryId("1-0"), batch.to_bytes()))
    assert other.load() == WorkerLoad(80, 6, 2)


async def test_a_router_that_left_has_nothing_under_way(one: Router, other: Router) -> None:
    await one.book_one("r")
    await other.book_one("own")
    tell(one, other)

    def gone(owner: str, cause: DeleteCause) -> WatchBatch:
        key = f"v1/kv_routers/dynamo/backend/{owner}"
        return WatchBatch((Delete(key, Revision("1-0"), cause),), Revision("1-0"))

    other.sync.apply_records(gone(one.owner, DeleteCause.RESYNC))
    assert other.load().request_count == 2  # the registry may just have lost it
    other.sync.apply_records(gone(one.owner, DeleteCause.EXPIRED))
    other.sync.apply_records(gone(other.owner, DeleteCause.EXPIRED))  # it knows better
    assert other.load().request_count == 1


def listed(*owners: str, **settings: Any) -> WatchBatch:
    """Records of these routers come."""
    puts = []
    for owner in owners:
        record = RouterRecord(
            namespace="dynamo", component="backend", router_id=owner, instance_id=1, settings=settings
        )
        stored = Record(record.key, record.to_bytes(), Revision("1-0"), Revision("1-0"), 1, None)
        puts.append(Put(stored))
    return WatchBatch(tuple(puts), Revision("1-0"))


async def test_a_router_waits_for_the_word_of_those_listed(one: Router, other: Router) -> None:
    one.sync._has_caught_up = True
    meeting = asyncio.create_task(one.sync.wait_for_peers(60.0))
    await asyncio.sleep(0)
    one.sync.apply_records(listed(other.owner, one.owner))
    await other.book_one("r")
    await asyncio.sleep(0)
    assert not meeting.done()
    other.said.clear()
    other.sync.apply_records(listed(one.owner))
    tell(other, one)
    await meeting
    assert one.load().request_count == 1


async def test_router_that_reads_no_bookings_gets_none(one: Router) -> None:
    await one.book_one("r")
    one.said.clear()
    one.sync.apply_records(listed("deaf", router_replica_sync=False))
    assert one.said == []
    one.sync.apply_records(listed("new"))
    assert [event[0] for event in one.said] == ["active", "active"]
    one.said.clear()
    one.sync.apply_records(listed("new"))
    assert one.said == [], "it was known"


async def test_a_record_that_cannot_be_read_is_named(other: Router, caplog: pytest.LogCaptureFixture) -> None:
    key = "v1/kv_routers/dynamo/backend/zz"
    record = Record(key, b'{"version":1e999}', Revision("1-0"), Revision("1-0"), 1, None)
    other.sync.apply_records(WatchBatch((Put(record),), Revision("1-0")))
    assert f"`dynamo-redis del {key}` removes it" in caplog.text


async def test_unreadable_messages_are_skipped(one: Router, other: Router) -> None:
    def say(*events: Any) -> None:
        batch = EventBatch("active_sequences_events", one.publisher, 0, 0, list(events))
        other.sync.apply(Entry(EntryId("1-0"), batch.to_bytes()))

    other.sync.apply(Entry(EntryId("1-0"), b"\xc1 no msgpack"))
    say(
        None,
        "add",
        ["add"],
        ["add", "r", "no number", 0, 1, 1, 1.0],
        ["add", "r", 7, 1, None, 1, 1.0],
        ["add", "r", 7, 1, 40, 3, float("nan")],
        ["add", "r", 7, 1, 40, 3, -1.0],
        ["add", "r", float("inf"), 1, 40, 3, 1.0],
        ["add", "r", 7, 1, 40, 3, 1.0, "no binary"],
        ["add", "r", 7, 1, 40, 3, 1.0, b"no names"[:7]],
        ["add", "r", 7, 1, 40, 3, 1.0, bytes(8), 1],
        ["active", [["r", 7, 1, 40, 3, 1.0, bytes(8), -1]]],
        ["active", "none"],
        ["active", [["r"]]],
        ["free"],
        ["free", 3],
        ["of a later release", 1, 2],
    )
    assert other.book.booking_count == 0
    say(["add", "good", 7, 1, 40, 3, 600.0, bytes(16), 0, "and a field of a later release"])
    assert other.load() == WorkerLoad(40, 3, 1)


async def store(teller: Router, streams: MemoryEventStreams) -> None:
    """Put what it has said into the stream, now."""
    for entry in teller.messages():
        await streams.append(STREAM, [NewEntry(entry.content, 1)])


async def test_old_bookings_count_from_the_time_they_were_sent(clock: HeldClock) -> None:
    """Also where it is said to last for long; and what the dead have said counts for nothing."""
    streams, registry = MemoryEventStreams(clock=clock), MemoryRegistry(MemoryServer())
    alive, dead, late = (Router(epoch, clock, streams, registry) for epoch in (1, 2, 3))
    await registry.start()
    await registry.register(f"v1/kv_routers/dynamo/backend/{alive.owner}", RECORD)
    for router in (alive, dead):
        await router.book_one("old")
        await store(router, streams)
    clock.now += 20
    await alive.book_one("young")
    await store(alive, streams)
    try:
        await late.sync.start(30.0)
        assert late.load().request_count == 2
        late.book.expire(clock.now + LEASE_S - 20)
        assert late.load().request_count == 1
        late.book.expire(clock.now + LEASE_S)
        assert late.load() == IDLE
    finally:
        await late.sync.aclose()
        await registry.aclose()


async def test_a_starting_router_reads_all_of_large_entries(clock: HeldClock) -> None:
    """A read has fewer of them than it asks for: the dead among the last of them count for nothing, too."""
    streams, registry = MemoryEventStreams(clock=clock), MemoryRegistry(MemoryServer())
    dead, alive, late = (Router(epoch, clock, streams, registry) for epoch in (1, 2, 3))
    tail = streams.tail

    def tail_by_one(*args: Any, **options: Any) -> EventTail:
        opened = tail(*args, **options)
        read = opened.read

        async def read_one(*, count: int, block_s: float) -> list[Entry]:
            return await read(count=1, block_s=block_s)

        opened.read = read_one  # type: ignore[method-assign]
        return opened

    streams.tail = tail_by_one  # type: ignore[method-assign]
    await registry.start()
    await registry.register(f"v1/kv_routers/dynamo/backend/{alive.owner}", RECORD)
    for name in ("a", "b", "c"):
        await dead.book_one(name)
    await alive.book_one("last")
    await store(dead, streams)
    await store(alive, streams)
    late.sync._routers = {alive.owner}
    try:
        await late.sync.start(30.0)
        async with asyncio.timeout(30):
            while alive.owner not in late.book.owners():
                await asyncio.sleep(0.01)
        assert late.load().request_count == 1
    finally:
        await late.sync.aclose()
        await registry.aclose()


async def test_names_behind_an_unreadable_booking_are_not_guessed(one: Router, other: Router) -> None:
    names = bytes(range(16))
    told = ["active", [["a", 7, 1, 40, 3, 9.0, names, 0], ["b"], ["c", 7, 1, 40, 3, 9.0, b"", 2]]]
    batch = EventBatch("active_sequences_events", one.publisher, 0, 0, [told])
    other.sync.apply(Entry(EntryId("1-0"), batch.to_bytes()))
    assert other.book.booking_count == 1
