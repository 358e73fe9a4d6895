"""Sends a process's events: numbered, in order, in batches, and without making the caller wait.

An event is packed when it is published, and waits in a bounded queue until its batch is sent. A batch is sent
when it is full (by count or bytes), or when its oldest event has waited for the linger. One round trip is
under way at a time, with one batch, or with several if several wait. A round trip that fails is repeated
until it succeeds. So order holds; a batch may be stored twice, if the answer of an attempt was lost, and its
sequence shows the repetition.

When the queue is full events are left out. They take their sequences, so a reader sees a gap, and asks the
publisher's process for the events it missed. The queue accepts events again when all that wait have been
sent; then a batch without events has the next sequence, and so shows the gap.

Round trips have a *pace*, too: after `BURST_COUNT` in quick succession, an open batch waits until the
publisher's share of the trips that all publishers may make together is due. So a thousand publishers with
some events a second each send several together.

A publisher that is silent sends a batch without events from time to time. A reader that lost the last events
(a message without a receiver, a write lost with a failover) then need not wait for the next event to see it.

While no reader wants its events a publisher *rests*: events take their sequences and are dropped. A reader
that comes later gets the earlier state in another way, and wakes the publisher first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
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
"""A batch is closed when its events have this size."""
TRIP_BATCHES_COUNT: Final = 8
BURST_COUNT: Final = 20
"""Round trips that do not wait for the pace, after a time in which none was made."""
"""Most batches of one round trip."""
CLOSE_S: Final = 1.0
"""Longest time that `aclose` waits until the events are sent."""
SILENCE_S: Final = 30.0
"""Time without events after which a publisher to a stream sends a batch without events."""
TOPIC_SILENCE_S: Final = 3.0
"""The same for a topic, where any message may be lost."""
LOOK_S: Final = 10.0
"""Pause between two checks whether the stream has readers, of a publisher that sends."""
REPORT_S: Final = 30.0
"""Shortest pause between two log lines that events are not sent, for one reason: it may come and go."""


class EventPublisher:
    """One publisher of one stream, or with `durable=False` of one topic. For the event loop's thread.

    `start` begins sending; events may be published before. `aclose` ends it. It owns a task, which waits for
    events, and a timer, for the end of the linger or of the silence.
    """

    # With slots, since CPython keeps up to 30 attributes of other instances inline, and is slower with more.
    __slots__ = (
        "_batch_count",
        "_closed",
        "_closed_bytes",
        "_due",
        "_durable",
        "_first",
        "_full_at",
        "_full_bytes",
        "_is_gap",
        "_last",
        "_limit_bytes",
        "_limit_count",
        "_linger_s",
        "_look_at",
        "_max_age_s",
        "_on_pace_at",
        "_only_while_read",
        "_open",
        "_open_bytes",
        "_overflows",
        "_publisher",
        "_ready",
        "_rests_count",
        "_sent",
        "_sent_sequence",
        "_silence_s",
        "_stream",
        "_streams",
        "_task",
        "_timer",
        "_trips_per_s",
        "_trouble",
        "_wakes_count",
        "is_resting",
        "left_out_count",
        "next_sequence",
    )

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
        trips_per_s: Callable[[], float] | None = None,
    ) -> None:
        """Make a publisher that does not send yet.

        Args:
            streams: the event streams of the store.
            stream: the stream, or the topic.
            publisher: the id that its batches have.
            settings: batches, linger and queue.
            durable: whether it is a stream; False for a topic.
            max_age_s: as in `EventStreams.append`.
            only_while_read: whether it checks by itself if its stream has readers, and rests without them.
            trips_per_s: returns its pace: the round trips a second that it may make in the long run; full
                batches are sent in any case. None: no pace.
        """
        self._streams = streams
        self._stream = stream
        self._publisher = publisher
        self._durable = durable
        self._max_age_s = max_age_s
        self._only_while_read = only_while_read
        self._trips_per_s = trips_per_s
        self._on_pace_at = 0.0
        """The time by which the trips made so far would have been made at the pace."""
        self._linger_s = settings.event_linger_s
        self._batch_count = settings.event_batch_count
        self._limit_count = settings.event_queue_count
        self._limit_bytes = int(settings.event_queue_size_bytes)
        self._silence_s = SILENCE_S if durable else TOPIC_SILENCE_S

        self.next_sequence = 0
        self.left_out_count = 0
        self.is_resting = False
        """True while events only take their sequences, because no reader wants them."""
        self._rests_count = self._wakes_count = 0
        self._look_at = 0.0
        self._open: list[bytes] = []
        """The events of the batch that is being filled."""
        self._open_bytes = 0
        self._first = 0
        """The sequence of the first of them."""
        self._last = self._batch_count - 1
        """The sequence of the event that fills this batch."""
        self._ready: deque[NewEntry] = deque()
        """Batches that are full, or have waited for the linger."""
        self._closed_bytes = 0
        """Size of all batches that wait, or are being sent, without the open one."""
        self._is_gap = False
        """True if events after the last one that waits have been left out."""
        self._sent_sequence = 0
        """The first sequence that may still wait: all events below it have been sent, or left out."""
        self._full_at = self._limit_count
        """The first sequence that has no room in the queue; 0 during a gap."""
        self._full_bytes = self._limit_bytes
        """Size of the open batch at which the queue is full."""
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
        """Begin to send. To be called once. Does not wait for Redis."""

        async def send_on() -> None:
            while True:
                await self._due.wait()
                self._due.clear()
                self._stop_timer()
                await self._send()
                if self._open or self._ready or self._is_gap:
                    if self._ready or self._timer is None:  # the events were left over, and have waited
                        self._due.set()
                elif self._only_while_read or not self.is_resting:
                    self._set_timer(self._silence_s)

        assert self._task is None, "the publisher has been started"
        self._look_at = asyncio.get_running_loop().time() + LOOK_S
        self._task = asyncio.create_task(send_on(), name=f"event publisher of {self._stream.path}")
        if self._open or self._ready:
            self._due.set()

    # ------------------------------------------------------------------ the queue

    @property
    def queued_count(self) -> int:
        """Events that wait, or are being sent."""
        return self._first + len(self._open) - self._sent_sequence

    def publish(self, event: Any) -> int:
        """Queue an event; return its sequence. Never waits, and raises no StoreError.

        Raises TypeError, ValueError or OverflowError if msgpack cannot carry it; then it takes no sequence.
        The caller may change the event afterwards. While the publisher rests the event is not packed.
        """
        if self.is_resting:
            self.next_sequence += 1
            return self.next_sequence - 1
        packed = pack_known(event)
        sequence = self.next_sequence
        self.next_sequence = sequence + 1
        open_bytes = self._open_bytes
        if sequence >= self._full_at or open_bytes >= self._full_bytes:
            self._leave_out()
            return sequence
        self._open.append(packed)
        self._open_bytes = open_bytes = open_bytes + len(packed)
        if sequence >= self._last or open_bytes >= BATCH_BYTES:
            self._close_batch()
            self._due.set()
        elif sequence == self._first:
            self._set_timer(
                self._linger_s if self._trips_per_s is None else self._wait_s(self._trips_per_s())
            )
        return sequence

    def _wait_s(self, trips_per_s: float) -> float:
        """Return for how long a batch waits that is opened now: for the linger, or for its turn."""
        share_s = 1 / trips_per_s
        turn_s = self._on_pace_at - (BURST_COUNT - 1) * share_s - asyncio.get_running_loop().time()
        return max(self._linger_s, min(turn_s, share_s))

    def _leave_out(self) -> None:
        """Count an event that has no room. The first one begins a gap."""
        self.left_out_count += 1
        if not self._is_gap and not self._closed:
            self._overflows.log("%s: the queue of events is full, some are left out", self._stream.path)
            self._is_gap = True
            self._measure_room()
            self._due.set()

    def _measure_room(self) -> None:
        """Compute at which event the queue is full."""
        self._full_at = 0 if self._is_gap else self._sent_sequence + self._limit_count
        self._full_bytes = self._limit_bytes - self._closed_bytes

    def _begin_at_next(self) -> None:
        """Begin an empty queue with the next event."""
        self._first = self._sent_sequence = self.next_sequence
        self._last = self._first + self._batch_count - 1
        self._is_gap = self._closed
        self._measure_room()

    def _close_batch(self) -> None:
        """Close the open batch as it is, with events or without."""
        packed, self._open, self._open_bytes = self._open, [], 0
        now_ms = int(SYSTEM_CLOCK.wall() * 1000)
        content = EventBatch.of_packed(self._stream.topic, self._publisher, self._first, now_ms, packed)
        self._ready.append(NewEntry(content, len(packed)))
        self._closed_bytes += len(content)
        self._full_bytes = self._limit_bytes - self._closed_bytes
        self._first += len(packed)
        self._last = self._first + self._batch_count - 1

    # ------------------------------------------------------------------ rest

    def rest(self) -> None:
        """Stop sending until `wake`, and drop the events that wait. Idempotent."""
        if self.is_resting:
            return
        self.is_resting = True
        self._rests_count += 1
        self._open, self._open_bytes, self._closed_bytes = [], 0, 0
        self._ready.clear()
        self._begin_at_next()
        self._stop_timer()
        self._sent.set()

    def wake(self) -> None:
        """Send the events that are published from now on: a reader wants them. Idempotent."""
        self._wakes_count += 1
        if self.is_resting and not self._closed:
            self.is_resting = False
            self._begin_at_next()
            self._set_timer(self._silence_s)

    async def _has_readers(self) -> bool:
        """Return whether there are readers, as far as is known; begin to rest if there are none. Raises
        StoreError."""
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

    # ------------------------------------------------------------------ sending

    def _next_batches(self) -> list[NewEntry]:
        """Return the batches of the next round trip. If no event waits: one without events."""
        if not self._ready:
            if not self._open:
                self._begin_at_next()
            self._close_batch()
        count = min(len(self._ready), TRIP_BATCHES_COUNT)
        return [self._ready.popleft() for _ in range(count)]

    async def _send(self) -> None:
        """Repeat one round trip until it has succeeded, or no reader wants the events."""
        backoff = Backoff()
        entries: list[NewEntry] = []
        rests_count = self._rests_count
        while rests_count == self._rests_count:
            try:
                if not await self._has_readers():
                    return
                entries = entries or self._next_batches()
                if self._durable:
                    await self._streams.append(self._stream, entries, max_age_s=self._max_age_s)
                else:
                    for entry in entries:
                        await self._streams.publish(self._stream, entry.content)
                break
            except StoreError as exc:
                if not self.queued_count:  # it was a batch without events
                    log.debug("%s: %s", self._stream.path, exc)
                elif self._trouble.begin(exc.answer_code):  # once for each reason and `REPORT_S`
                    log.warning(
                        "%s: events are not sent, %d wait: %s", self._stream.path, self.queued_count, exc
                    )
                await asyncio.sleep(backoff.next_s())
        if self._trouble.end() is not None:
            log.info("%s: events are sent again", self._stream.path)
        if rests_count != self._rests_count:  # `rest` has dropped these events meanwhile
            return
        if self._trips_per_s is not None:
            now = asyncio.get_running_loop().time()
            self._on_pace_at = max(self._on_pace_at, now) + 1 / self._trips_per_s()
        event_count = sum(entry.event_count for entry in entries)
        self._closed_bytes -= sum(len(entry.content) for entry in entries)
        self._sent_sequence += event_count
        self._measure_room()
        self._sent.set()

    def _set_timer(self, wait_s: float) -> None:
        """Have the task look for events in `wait_s`."""
        self._stop_timer()
        if self._task is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._due.set)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------ end

    async def flush(self, timeout_s: float) -> bool:
        """Send the events that wait, at once. Return whether none of those published before waits any
        more."""
        target = self.next_sequence
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._sent_sequence < target and not self.is_resting:
                    self._due.set()
                    self._sent.clear()
                    await self._sent.wait()
        return self.is_resting or self._sent_sequence >= target

    async def aclose(self) -> None:
        """Send the events that wait, for `CLOSE_S` at most, and end. Events published later are left out.
        Idempotent."""
        if self._closed:
            return
        if self._task is not None:
            await self.flush(CLOSE_S)
        self._closed = self._is_gap = True
        self._measure_room()
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
