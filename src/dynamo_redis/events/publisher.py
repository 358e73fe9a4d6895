"""What sends a process's events: numbered, in batches, in order, and without ever making their maker wait.

An event is packed when it is published, and waits in a bounded queue until its batch is sent: when enough
have come (by count or bytes), or the oldest has waited for the linger. One round trip is under way at a time,
of one batch or, when more than one batch waits, of several. While it fails it is repeated, for as long as it
takes: order holds, and what was stored by an attempt whose answer was lost comes twice, which its sequence
tells.

When the queue is full, events are left out: they take their sequences, so whoever follows sees a gap, and
asks the publisher's process for what it missed. None is taken in again before all that waits has been sent;
then a batch without events says which sequence is next, and so shows the gap.

A publisher that is silent says now and then how far it is, by a batch without events, so that who lost the
last ones (a message nobody heard, a write lost with a failover) does not have to wait for the next.

While no reader wants its events a publisher *rests*: events take their sequences and go nowhere. A reader
that comes later learns in another way what it needs of the past, and wakes the publisher before that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.config import EventSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.event_base import EventStreams, NewEntry, StreamName
from dynamo_redis.store.redis.health import Trouble
from dynamo_redis.wire.codec import pack_known
from dynamo_redis.wire.event import EventBatch, PublisherId

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 256 << 10
"""A batch is closed when it has so many bytes of events."""
TRIP_BATCHES_COUNT: Final = 8
"""Most batches sent in one round trip."""
CLOSE_S: Final = 1.0
SILENCE_S: Final = 30.0
"""How long a publisher to a stream says nothing before it says how far it is."""
TOPIC_SILENCE_S: Final = 3.0
"""The same for a topic, of which any message may be lost."""
LOOK_S: Final = 10.0
"""Pause between two looks for readers, of a publisher that has events and rests for want of readers."""
REPORT_S: Final = 30.0
"""Least pause between two log lines that events are not sent, for one reason: it may come and go."""


class EventPublisher:
    """One publisher of one stream, or with `durable=False` of one topic. For the event loop's thread.

    `start` begins sending; events may be published before. `aclose` ends it. Its task waits for events, and
    one timer for the end of the linger or of the silence. `max_age_s` is as in `EventStreams.append`.
    """

    def __init__(
        self,
        streams: EventStreams,
        stream: StreamName,
        publisher: PublisherId,
        settings: EventSettings,
        *,
        durable: bool = True,
        max_age_s: float | None = None,
        only_while_read: bool = False,
    ) -> None:
        """`only_while_read`: it looks itself whether its stream has readers, and rests while it has none."""
        self._streams = streams
        self._stream = stream
        self._publisher = publisher
        self._durable = durable
        self._max_age_s = max_age_s
        self._only_while_read = only_while_read
        self._linger_s = settings.event_linger_s
        self._batch_count = settings.event_batch_count
        self._limit_count = settings.event_queue_count
        self._limit_bytes = int(settings.event_queue_size_bytes)
        self._silence_s = SILENCE_S if durable else TOPIC_SILENCE_S

        self.next_sequence = 0
        self.queued_count = 0
        """Events that wait, or are under way."""
        self.left_out_count = 0
        self.is_resting = False
        """Whether events take their sequences only, since no reader wants them."""
        self._rests_count = self._wakes_count = 0
        self._look_at = 0.0
        self._open: list[bytes] = []
        """The events of the batch that is being filled."""
        self._open_bytes = 0
        self._first = 0
        """The sequence of the first of them."""
        self._ready: deque[NewEntry] = deque()
        """Batches that are full, or have waited."""
        self._closed_bytes = 0
        """Of all batches that wait, or are under way, but the open one."""
        self._is_gap = False
        """Whether events behind the last that waits have been left out."""
        self._sent_sequence = 0
        """Nothing below it waits any more."""
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._sent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._trouble = Trouble(REPORT_S)
        self._overflows = RateLimitedLog(log)
        self._closed = False

    def __repr__(self) -> str:
        state = f"{self.next_sequence} published, {self.queued_count} queued, {self.left_out_count} left out"
        return f"<EventPublisher of {self._stream.path}: {state}>"

    async def start(self) -> None:
        """Begin to send. Once. Does not wait for Redis."""
        assert self._task is None, "the publisher has been started"
        self._look_at = asyncio.get_running_loop().time() + LOOK_S
        self._task = asyncio.create_task(self._run(), name=f"event publisher of {self._stream.path}")
        if self._open or self._ready:
            self._due.set()

    # ------------------------------------------------------------------ in

    def publish(self, event: Any) -> int:
        """Queue an event; answer its sequence. Never waits, and never raises for Redis.

        Raises TypeError, ValueError or OverflowError if msgpack cannot carry it; then it takes no sequence.
        The event may be changed afterwards. While the publisher rests it is not looked at.
        """
        if self.is_resting:
            self.next_sequence += 1
            return self.next_sequence - 1
        packed = pack_known(event)
        sequence = self.next_sequence
        self.next_sequence = sequence + 1
        queued_count, open_bytes = self.queued_count, self._open_bytes
        is_full = queued_count >= self._limit_count or open_bytes + self._closed_bytes >= self._limit_bytes
        if is_full or self._is_gap:
            self._leave_out()
            return sequence
        events = self._open
        events.append(packed)
        count = len(events)
        self.queued_count = queued_count + 1
        self._open_bytes = open_bytes = open_bytes + len(packed)
        if count >= self._batch_count or open_bytes >= BATCH_BYTES:
            self._close_batch()
            self._due.set()
        elif count == 1:
            self._set_timer(self._linger_s)
        return sequence

    def _close_batch(self) -> None:
        """Take the open batch as it is, with events or without."""
        packed, self._open, self._open_bytes = self._open, [], 0
        now_ms = int(SYSTEM_CLOCK.wall() * 1000)
        content = EventBatch.of_packed(self._stream.topic, self._publisher, self._first, now_ms, packed)
        self._ready.append(NewEntry(content, len(packed)))
        self._closed_bytes += len(content)
        self._first += len(packed)

    def _leave_out(self) -> None:
        if not self._is_gap and not self._closed:
            self._overflows.log("%s: the queue of events is full, some are left out", self._stream.path)
            self._is_gap = True
            self._due.set()
        self.left_out_count += 1

    # ------------------------------------------------------------------ rest

    def rest(self) -> None:
        """Send nothing until `wake`, not even what waits. Idempotent."""
        if self.is_resting:
            return
        self.is_resting, self._is_gap = True, False
        self._rests_count += 1
        self._open, self._open_bytes, self._closed_bytes, self.queued_count = [], 0, 0, 0
        self._ready.clear()
        self._stop_timer()
        self._sent.set()

    def wake(self) -> None:
        """A reader wants what is published from now on. Idempotent."""
        self._wakes_count += 1
        if self.is_resting and not self._closed:
            self.is_resting = False
            self._first = self._sent_sequence = self.next_sequence
            self._set_timer(self._silence_s)

    async def _has_readers(self) -> bool:
        """Whether there are readers, as far as is known; if there are none it rests. Raises StoreError."""
        now = asyncio.get_running_loop().time()
        if not self._only_while_read or (now < self._look_at and not self.is_resting):
            return not self.is_resting
        wakes_count = self._wakes_count
        if await self._streams.keep_if_wanted(self._stream):
            self._look_at = now + LOOK_S
            self.wake()
        elif wakes_count == self._wakes_count:  # else it was woken after the server had answered
            self.rest()
        return not self.is_resting

    # ------------------------------------------------------------------ out

    async def _run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            self._stop_timer()
            await self._send()
            if self._open or self._ready or self._is_gap:
                if self._ready or self._timer is None:  # what is there was left over, and has waited
                    self._due.set()
            elif self._only_while_read or not self.is_resting:
                self._set_timer(self._silence_s)

    def _take(self) -> list[NewEntry]:
        """The batches of the next trip. If nothing waits: one that says how far the publisher is."""
        if not self._ready:
            if not self._open:
                self._is_gap = False
                self._first = self._sent_sequence = self.next_sequence
            self._close_batch()
        count = min(len(self._ready), TRIP_BATCHES_COUNT)
        return [self._ready.popleft() for _ in range(count)]

    async def _send(self) -> None:
        """Send what is due until it has succeeded, or no reader wants it."""
        backoff = Backoff()
        entries: list[NewEntry] = []
        rests_count = self._rests_count
        while rests_count == self._rests_count:
            try:
                if not await self._has_readers():
                    return
                entries = entries or self._take()
                await self._send_once(entries)
                break
            except StoreError as exc:
                self._report(exc)
                await asyncio.sleep(backoff.next_s())
        if self._trouble.end() is not None:
            log.info("%s: events are sent again", self._stream.path)
        if rests_count != self._rests_count:  # it forgot what waited, and what was under way
            return
        event_count = sum(entry.event_count for entry in entries)
        self.queued_count -= event_count
        self._closed_bytes -= sum(len(entry.content) for entry in entries)
        self._sent_sequence += event_count
        self._sent.set()

    async def _send_once(self, entries: Sequence[NewEntry]) -> None:
        if self._durable:
            await self._streams.append(self._stream, entries, max_age_s=self._max_age_s)
            return
        for entry in entries:
            await self._streams.publish(self._stream, entry.content)

    def _report(self, exc: StoreError) -> None:
        if not self.queued_count:  # it would only have said how far it is
            log.debug("%s: %s", self._stream.path, exc)
        elif self._trouble.begin(exc.answer_code):
            log.warning("%s: events are not sent, %d wait: %s", self._stream.path, self.queued_count, exc)

    def _set_timer(self, wait_s: float) -> None:
        self._stop_timer()
        if self._task is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._due.set)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------ end

    async def flush(self, timeout_s: float) -> bool:
        """Send at once what waits. Answers whether nothing of what was published before waits any more."""
        target = self.next_sequence
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._sent_sequence < target and not self.is_resting:
                    self._due.set()
                    self._sent.clear()
                    await self._sent.wait()
        return self.is_resting or self._sent_sequence >= target

    async def aclose(self) -> None:
        """Send what waits, for a second, and end. Events published later are left out. Idempotent."""
        if self._closed:
            return
        if self._task is not None:
            await self.flush(CLOSE_S)
        self._closed = self._is_gap = True
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
