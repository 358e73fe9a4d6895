"""Exchanges bookings between the routers of the same workers: the requests that each has under way.

Each router publishes its bookings to one stream a component, bounded by time, and reads the bookings of the
other routers; `booking_messages.py` has the messages. Every `RENEW_S` a router sends all its bookings again.
Another router's booking counts for `LEASE_S` after it was last sent, and no longer than its request's
deadline. So the load of a request whose "free" was lost ends, a lost "add" is made good by the next renewal,
and a router that starts needs only the last `LEASE_S` of the stream.

The bookings of a router that died end when its lease, and with it its record in the registry, is gone. A
router that starts, or that could not read for a while, reads old messages. Their bookings count from the time
at which they were sent, by the stream's own clock. If the sender has no record any more, they do not count.

A router that is alone sends nothing: its publisher rests. When the registry lists another router, or a
message of one comes, it sends all its bookings, and further ones from then on.

While Redis is away the bookings of other routers expire, and this router chooses by its own.
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
from dynamo_redis.router.choice.booking_messages import (
    RemoteBooking,
    active_messages,
    add_message,
    read_booking,
)
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.peers import Peers
from dynamo_redis.router.pace import Pace
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.store.base import DeleteCause, Put, Registry, WatchBatch
from dynamo_redis.store.event_base import Entry, EventStreams, StreamName, entry_order
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.topics import ACTIVE_SEQUENCES

log = logging.getLogger(__name__)

RENEW_S = 10.0
LEASE_S = 3 * RENEW_S

_KEPT_S = 2 * LEASE_S  # in the stream: more than a late router reads, since clocks and timers are not exact
_READ_COUNT = 64
_BLOCK_S = 1.0
_OLD_BLOCK_S = 0.01  # for a read of old messages

PACE_S = 0.005
"""Shortest time between two reads while other routers send, and in the long run between two messages of this
one: late bookings make for worse choices."""


def owner_name(publisher: PublisherId) -> str:
    """Return a router's name, for bookings and for its record in the registry: `694d98147d54bfde-5f1c`."""
    return f"{publisher.instance_id:x}-{publisher.epoch:x}"


class BookingSync:
    """Sends this router's bookings to other routers, and books theirs. A `BookingListener` of the chooser.

    It owns the publisher (bounded; after an overflow the next renewal sends all bookings) and three tasks:
    one reads the stream, one renews, one watches the routers' records. All end with `aclose`.
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
        """`bookings` returns all present bookings of this router."""
        self._streams = streams
        self._registry = registry
        self._records = kv_routers_prefix(namespace, component)
        self._stream = StreamName(namespace, component, ACTIVE_SEQUENCES)
        self._owner = owner_name(publisher)
        self._publisher = EventPublisher(
            streams, self._stream, publisher, settings, max_age_s=_KEPT_S, trips_per_s=lambda: 1 / PACE_S
        )
        self._book = book
        self._bookings = bookings
        self._clock = clock
        self._peers = Peers(clock, LEASE_S)
        self._tasks: list[asyncio.Task[None]] = []
        self._routers: set[str] | None = None
        """The routers that have a record; None until they are known."""
        self._has_caught_up = False
        self._ready = asyncio.Event()
        self._peers_changed = asyncio.Event()
        """Set when a router is listed, leaves, or sends a message."""
        self._supervisor = Supervisor(log, f"sync of {self._stream.path}", pauses_s=(0.1, 2.0))

    # ----------------------------------------------------------------- lifetime

    async def start(self, timeout_s: float) -> None:
        """Begin, and wait until the bookings of other routers are known, for `timeout_s` at most."""

        async def renew_on() -> None:
            while True:
                await asyncio.sleep(RENEW_S)
                self.renew()

        self._publisher.rest()
        await self._publisher.start()
        for name, work in (
            ("sync", self._read()),
            ("renewal", self._supervisor.run(renew_on)),
            ("routers", follow(self._registry, self._records, self.apply_records, self._supervisor)),
        ):
            self._tasks.append(asyncio.create_task(work, name=f"{name} {self._stream.path}"))
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            log.warning("the bookings of other routers are not known yet: Redis is slow, or away")

    async def wait_for_peers(self, timeout_s: float) -> None:
        """Wait until all routers that the registry lists have sent their bookings, for `timeout_s` at most.
        This router's own record must be in the registry."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._owner not in (self._routers or ()) or not self._peers.all_heard():
                    self._peers_changed.clear()
                    await self._peers_changed.wait()

    async def aclose(self) -> None:
        """End its tasks, and send the messages that wait, for a second at most."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._publisher.aclose()

    # ----------------------------------------------------------------- sending

    def added(self, booking: Booking) -> None:
        """Send a new booking."""
        if not self._publisher.is_resting:
            self._publisher.publish(add_message(booking, self._clock.monotonic()))

    def prefill_done(self, request_id: str) -> None:
        """Send that the prompt of a request is read."""
        self._publisher.publish(["prefill_done", request_id])

    def freed(self, request_id: str) -> None:
        """Send that a request is over."""
        self._publisher.publish(["free", request_id])

    def renew(self) -> None:
        """Send all bookings, or rest if there is no other router."""
        self._rest_if_alone()
        for message in active_messages(self._bookings(), self._clock.monotonic()):
            self._publisher.publish(message)

    def _rest_if_alone(self) -> None:
        if self._tasks and not self._peers:
            self._publisher.rest()

    def _greet(self) -> None:
        """Send all bookings to a router that has come, also if there are none."""
        self._publisher.wake()
        self._publisher.publish(["active", []])
        self.renew()

    # ----------------------------------------------------------------- receiving

    def apply_records(self, batch: WatchBatch) -> None:
        """Note which routers there are, and end the bookings of routers whose records were deleted.

        After a resync a router's bookings stay: the registry may have lost its record, which then comes back
        in a moment. A record that cannot be read is named in the log, and counts as a router that reads
        bookings.
        """
        routers = set() if self._routers is None else self._routers
        has_come = False
        for event in batch.events:
            owner = decode_segment(key_of(event).removeprefix(self._records))
            if isinstance(event, Put):
                routers.add(owner)
                try:
                    settings = RouterRecord.from_record(event.record).settings
                    reads_bookings = settings.get("router_replica_sync") is not False
                except InvalidRecord as exc:
                    self._supervisor.skip(event.record.key, exc)
                    reads_bookings = True
                if not reads_bookings:
                    self._peers.remove(owner)
                elif owner != self._owner:
                    has_come |= self._peers.note_listed(owner)
                continue
            routers.discard(owner)
            if event.cause is DeleteCause.RESYNC:
                self._peers.note_vanished(owner)
            elif owner != self._owner:
                self._peers.remove(owner)
                self._book.drop_owner(owner)
        if self._routers is None:
            self._routers = routers
            self._drop_dead_routers()
        if has_come:
            self._greet()
        self._rest_if_alone()
        self._peers_changed.set()

    async def _read(self) -> None:
        """Read the stream: its last `LEASE_S`, and then each entry as it comes."""
        tail = self._streams.tail(self._stream, max_age_s=LEASE_S)
        pace = Pace(PACE_S, _READ_COUNT)

        async def read_on() -> None:
            now_ms = await self._streams.time_ms(self._stream)
            # A read of large entries may return fewer than asked for, although more follow.
            while entries := await tail.read(count=_READ_COUNT, block_s=_OLD_BLOCK_S):
                for entry in entries:
                    self.apply(entry, age_s=max(now_ms - entry_order(entry.entry_id)[0], 0) / 1000)
                if entry_order(entries[-1].entry_id)[0] > now_ms:
                    break
            if not self._has_caught_up:
                self._has_caught_up = True
                self._drop_dead_routers()
            while True:
                entries = await tail.read(count=_READ_COUNT, block_s=_BLOCK_S)
                for entry in entries:
                    self.apply(entry)
                await pace.wait(len(entries))

        try:
            await self._supervisor.run(read_on)
        finally:
            await tail.aclose()

    def _drop_dead_routers(self) -> None:
        """End the bookings of routers that died before this one started, once both the old messages and the
        routers' records are known. A router that lives after all sends its bookings within `RENEW_S`."""
        if self._has_caught_up and self._routers is not None:
            for owner in set(self._book.owners()) - self._routers - {self._owner}:
                self._book.drop_owner(owner)
            self._ready.set()

    def apply(self, entry: Entry, *, age_s: float = 0.0) -> None:
        """Apply an entry that was sent `age_s` ago. This router's own entries, and entries that cannot be
        read, are skipped."""

        def apply_event(event: Any) -> None:
            match event:
                case ["add", *described]:
                    self._add(owner, read_booking(described), age_s)
                case ["prefill_done", str(request_id), *_]:
                    self._book.prefill_done(owner, request_id)
                case ["free", str(request_id), *_]:
                    self._book.free(owner, request_id)
                case ["active", list(active), *_]:
                    self._add_all(owner, active, age_s)

        try:
            batch = EventBatch.from_bytes(entry.content)
        except InvalidRecord as exc:
            self._supervisor.skip(f"entry {entry.entry_id} of {self._stream.path}", exc)
            return
        owner = owner_name(batch.publisher)
        if owner == self._owner:
            return
        if self._has_caught_up:  # else the message may be old, and its router gone, or at rest
            was_alone = not self._peers
            self._peers.note_heard(owner)
            if was_alone:
                self._greet()
            self._peers_changed.set()
        # An event that is broken is skipped alone: the next renewal has the bookings that count.
        self._supervisor.each(batch.events, apply_event, lambda _: f"an event of {owner}")

    def _add_all(self, owner: str, active: list[Any], age_s: float) -> None:
        """Book all bookings of an "active" message."""
        before = b""

        def add(described: Any) -> None:
            nonlocal before
            names, before = before, b""  # after a booking that cannot be read the next has no names to share
            booking = read_booking(described, names)
            before = booking.names
            self._add(owner, booking, age_s)

        self._supervisor.each(active, add, lambda _: f"a booking of {owner}")

    def _add(self, owner: str, booking: RemoteBooking, age_s: float) -> None:
        """Book a request of another router, unless its time is over."""
        left_s = min(booking.left_s, LEASE_S) - age_s
        if not left_s > 0:  # also False for NaN
            return
        self._book.add(
            owner,
            booking.request_id,
            booking.worker,
            prefill_tokens=booking.prefill_tokens,
            blocks=booking.blocks,
            deadline=self._clock.monotonic() + left_s,
            names=booking.names,
        )
