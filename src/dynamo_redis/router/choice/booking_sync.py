"""What routers of the same workers tell each other: which requests they have under way.

Each router publishes its bookings to one stream a component, bounded by time, and reads the others':
`booking_messages.py` has what they say. Every `RENEW_S` a router names all that it has under way. Another
router's booking counts for `LEASE_S` after it was last named, and no longer than its request's deadline. This
one rule ends the load of requests whose "free" was lost; it brings back an "add" that was lost; and it is why
a router that starts needs no more of the stream than its last `LEASE_S`.

The bookings of a router that died end with its lease, by its record in the registry. A router that starts, or
that could not read for a while, reads what was said before: that counts from when it was said, by the
stream's own clock, and not at all if its router has no record any more.

A router that is alone says nothing: its publisher rests. When the registry lists another one, or another one
says something, it names all that it has under way, and goes on from there.

While Redis is away the others' bookings run out, and this router chooses by its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.config import EventSettings
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.events.publisher import EventPublisher
from dynamo_redis.events.router_record import RouterRecord
from dynamo_redis.names import decode_segment, kv_routers_prefix
from dynamo_redis.router.choice.booking import Booking
from dynamo_redis.router.choice.booking_messages import Told, active_messages, add_message, read_booking
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.peers import Peers
from dynamo_redis.router.pace import Pace
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.store.base import DeleteCause, Put, Record, Registry, WatchBatch
from dynamo_redis.store.event_base import Entry, EventStreams, EventTail, StreamName, entry_order
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.topics import ACTIVE_SEQUENCES

log = logging.getLogger(__name__)

RENEW_S = 10.0
LEASE_S = 3 * RENEW_S

_KEPT_S = 2 * LEASE_S  # in the stream: more than a late router reads, since clocks and beats are not exact
_READ_COUNT = 64
_BLOCK_S = 1.0
_GLANCE_S = 0.01

PACE_S = 0.005
"""Shortest time between two reads while others say something: what is heard late makes for worse choices."""


def owner_name(publisher: PublisherId) -> str:
    """What a router is called, in the registry too: `694d98147d54bfde-5f1c`."""
    return f"{publisher.instance_id:x}-{publisher.epoch:x}"


class BookingSync:
    """Tells other routers of this one's bookings, and books theirs. A `Listener` of the chooser.

    It owns the publisher (bounded; its overflow is made good by the next renewal) and three tasks: one reads
    the stream, one renews, one watches the routers' records. All end with `aclose`.
    """

    def __init__(
        self,
        streams: EventStreams,
        registry: Registry,
        namespace: str,
        component: str,
        publisher: PublisherId,
        settings: EventSettings,
        book: LoadBook,
        bookings: Callable[[], Iterable[Booking]],
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`bookings` are all that this router has under way, now."""
        self._streams = streams
        self._registry = registry
        self._records = kv_routers_prefix(namespace, component)
        self._stream = StreamName(namespace, component, ACTIVE_SEQUENCES)
        self._owner = owner_name(publisher)
        self._publisher = EventPublisher(streams, self._stream, publisher, settings, max_age_s=_KEPT_S)
        self._book = book
        self._bookings = bookings
        self._clock = clock
        self._peers = Peers(clock, LEASE_S)
        self._tasks: list[asyncio.Task[None]] = []
        self._routers: set[str] | None = None
        """Those that have a record; None until it is known."""
        self._has_caught_up = False
        self._ready = asyncio.Event()
        self._news = asyncio.Event()
        """Set when a router is listed, leaves, or says something."""
        self._supervisor = Supervisor(log, f"sync of {self._stream.path}", pauses_s=(0.1, 2.0))

    # ----------------------------------------------------------------- lifetime

    async def start(self, timeout_s: float) -> None:
        """Begin, and wait until what the others have said is known, for `timeout_s` at most."""
        self._publisher.rest()
        await self._publisher.start()
        for what, work in (
            ("sync", self._read()),
            ("renewal", self._renew()),
            ("routers", self._watch_routers()),
        ):
            self._tasks.append(asyncio.create_task(work, name=f"{what} {self._stream.path}"))
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            log.warning("what other routers have under way is not known yet: Redis is slow, or away")

    async def meet(self, timeout_s: float) -> None:
        """Wait until the routers that the registry lists beside this one have said what they have under way,
        for `timeout_s` at most. This router's own record is to stand there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._owner not in (self._routers or ()) or not self._peers.all_heard():
                    self._news.clear()
                    await self._news.wait()

    async def aclose(self) -> None:
        """End its tasks, and tell what is still to be told, for a second at most."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._publisher.aclose()

    # ----------------------------------------------------------------- telling

    def added(self, booking: Booking) -> None:
        """A request was booked."""
        if not self._publisher.is_resting:
            self._publisher.publish(add_message(booking, self._clock.monotonic()))

    def prefill_done(self, request_id: str) -> None:
        """Its prompt is read."""
        self._publisher.publish(["prefill_done", request_id])

    def freed(self, request_id: str) -> None:
        """It is over."""
        self._publisher.publish(["free", request_id])

    async def _renew(self) -> None:
        async def renew_on() -> None:
            while True:
                await asyncio.sleep(RENEW_S)
                self.renew()

        await self._supervisor.run(renew_on)

    def renew(self) -> None:
        """Name all that is under way."""
        self._rest_if_alone()
        for message in active_messages(self._bookings(), self._clock.monotonic()):
            self._publisher.publish(message)

    def _rest_if_alone(self) -> None:
        if self._tasks and not self._peers:
            self._publisher.rest()

    def _greet(self) -> None:
        """Another router has come: name all that is under way, even if that is nothing."""
        self._publisher.wake()
        self._publisher.publish(["active", []])
        self.renew()

    # ----------------------------------------------------------------- hearing

    async def _watch_routers(self) -> None:
        """A router that left, or whose lease ended, has nothing under way any more."""
        await follow(self._registry, self._records, self.forget_routers, self._supervisor)

    def forget_routers(self, batch: WatchBatch) -> None:
        """Note which routers are there, and end the bookings of those whose records went. A resync proves
        nothing: the registry may have lost them, and they are back in a moment. A record that cannot be read
        is named, and counts as that of a router which listens."""
        routers = set() if self._routers is None else self._routers
        has_come = False
        for event in batch.events:
            owner = decode_segment(key_of(event).removeprefix(self._records))
            if isinstance(event, Put):
                routers.add(owner)
                if not self._listens(event.record):
                    self._peers.left(owner)
                elif owner != self._owner:
                    has_come |= self._peers.listed(owner)
                continue
            routers.discard(owner)
            if event.cause is DeleteCause.RESYNC:
                self._peers.missed(owner)
            elif owner != self._owner:
                self._peers.left(owner)
                self._book.drop_owner(owner)
        if self._routers is None:
            self._routers = routers
            self._forget_the_dead()
        if has_come:
            self._greet()
        self._rest_if_alone()
        self._news.set()

    def _listens(self, record: Record) -> bool:
        """Whether a router's record says that it is told of others' bookings."""
        try:
            return RouterRecord.from_record(record).settings.get("router_replica_sync") is not False
        except InvalidRecord as exc:
            self._supervisor.skip(record.key, exc)
            return True

    async def _read(self) -> None:
        tail = self._streams.tail(self._stream, max_age_s=LEASE_S)
        pace = Pace(PACE_S, _READ_COUNT)

        async def read_on() -> None:
            await self._catch_up(tail)
            while True:
                entries = await tail.read(count=_READ_COUNT, block_s=_BLOCK_S)
                for entry in entries:
                    self.apply(entry)
                await pace.wait(len(entries))

        try:
            await self._supervisor.run(read_on)
        finally:
            await tail.aclose()

    async def _catch_up(self, tail: EventTail) -> None:
        """Read what was said before, up to what is said now."""
        now_ms = await self._streams.time_ms()
        # A read may have fewer entries than asked for, where they are large, and more follow all the same.
        while entries := await tail.read(count=_READ_COUNT, block_s=_GLANCE_S):
            for entry in entries:
                self.apply(entry, age_s=max(now_ms - entry_order(entry.entry_id)[0], 0) / 1000)
            if entry_order(entries[-1].entry_id)[0] > now_ms:
                break
        if not self._has_caught_up:
            self._has_caught_up = True
            self._forget_the_dead()

    def _forget_the_dead(self) -> None:
        """End the bookings of routers that died before this one started, once what was said before and the
        routers' records are both known. One that lives after all names its bookings within `RENEW_S`."""
        if self._has_caught_up and self._routers is not None:
            for owner in set(self._book.owners()) - self._routers - {self._owner}:
                self._book.drop_owner(owner)
            self._ready.set()

    def apply(self, entry: Entry, *, age_s: float = 0.0) -> None:
        """Book what another router said in one entry, `age_s` ago; one's own, and what cannot be read, is
        passed over."""
        try:
            batch = EventBatch.from_bytes(entry.content)
        except InvalidRecord as exc:
            self._supervisor.skip(f"entry {entry.entry_id} of {self._stream.path}", exc)
            return
        owner = owner_name(batch.publisher)
        if owner != self._owner:
            self._hear(owner)
            # One that is broken costs itself: the next renewal says what matters.
            self._supervisor.each(
                batch.events,
                lambda event: self._apply_event(owner, event, age_s),
                lambda _: f"a word of {owner}",
            )

    def _hear(self, owner: str) -> None:
        if not self._has_caught_up:  # it may have said that long ago, and be gone, or rest
            return
        was_alone = not self._peers
        self._peers.heard(owner)
        if was_alone:
            self._greet()
        self._news.set()

    def _apply_event(self, owner: str, event: Any, age_s: float) -> None:
        match event:
            case ["add", *described]:
                self._add(owner, read_booking(described), age_s)
            case ["prefill_done", str(request_id), *_]:
                self._book.prefill_done(owner, request_id)
            case ["free", str(request_id), *_]:
                self._book.free(owner, request_id)
            case ["active", list(active), *_]:
                self._add_all(owner, active, age_s)

    def _add_all(self, owner: str, active: list[Any], age_s: float) -> None:
        before = b""

        def take(described: Any) -> None:
            nonlocal before
            names, before = before, b""  # of one that cannot be read the next one knows no names
            told = read_booking(described, names)
            before = told.names
            self._add(owner, told, age_s)

        self._supervisor.each(active, take, lambda _: f"a booking of {owner}")

    def _add(self, owner: str, told: Told, age_s: float) -> None:
        left_s = min(told.left_s, LEASE_S) - age_s
        if not left_s > 0:  # nor if it is no number
            return
        self._book.add(
            owner,
            told.request_id,
            told.worker,
            prefill_tokens=told.prefill_tokens,
            blocks=told.blocks,
            deadline=self._clock.monotonic() + left_s,
            names=told.names,
        )
