"""What workers say of their load: fire and forget, the last value wins, and an old one counts for nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.router.base import Worker
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.store.event_base import EventStreams, StreamName
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.topics import KV_METRICS

log = logging.getLogger(__name__)

STALE_AFTER_S = 10.0
"""A worker that has said nothing for so long is judged by its bookings alone."""

_LISTEN_S = 1.0


class LoadMetrics:
    """The fill of the workers' KV caches, as they report it themselves: it corrects the load book.

    It owns one task, which listens to the topic until `aclose`. What is published while it does not listen is
    lost, and followed by the next value a moment later.
    """

    def __init__(
        self,
        streams: EventStreams,
        namespace: str,
        component: str,
        book: LoadBook,
        *,
        on_change: Callable[[], None],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._streams = streams
        self._topic = StreamName(namespace, component, KV_METRICS)
        self._book = book
        self._on_change = on_change
        self._clock = clock
        self._used: dict[Worker, tuple[int, int | None, float]] = {}  # blocks in use, of how many, since when
        self._reader: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, f"load metrics {self._topic.path}")

    def start(self) -> None:
        """Begin to listen."""
        if self._reader is None:
            self._reader = asyncio.create_task(
                self._supervisor.run(self._listen), name=f"load metrics {self._topic.path}"
            )

    async def aclose(self) -> None:
        """Listen no more."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def used_blocks(self, worker: Worker) -> tuple[int, int | None] | None:
        """How many KV blocks a worker's requests hold, of how many if it says; None if nothing is known."""
        known = self._used.get(worker)
        if known is None or self._clock.monotonic() - known[2] > STALE_AFTER_S:
            return None
        return known[:2]

    def expire(self) -> None:
        """Forget who has been silent for too long."""
        oldest = self._clock.monotonic() - STALE_AFTER_S
        for worker in [worker for worker, (_, _, at) in self._used.items() if at < oldest]:
            del self._used[worker]
            self._book.forget_report(worker)

    def apply(self, message: bytes) -> None:
        """Take in one message; one that cannot be read says nothing."""
        try:
            batch = EventBatch.from_bytes(message)
        except InvalidRecord as exc:
            self._supervisor.skip(f"a message of {self._topic.path}", exc)
            return
        worker = Worker(batch.publisher.instance_id, batch.publisher.dp_rank)
        for event in batch.events:
            used = _used_blocks(event)
            if used is not None:
                self._used[worker] = (*used, self._clock.monotonic())
                self._book.report(worker, used[0])
        self._on_change()

    async def _listen(self) -> None:
        subscription = await self._streams.subscribe(self._topic)
        try:
            while True:
                message = await subscription.next(_LISTEN_S)
                if message is not None:
                    self.apply(message)
        finally:
            await subscription.aclose()


def _used_blocks(event: Any) -> tuple[int, int | None] | None:
    if not isinstance(event, dict) or not isinstance(stats := event.get("kv_stats"), dict):
        return None
    active, total = stats.get("kv_active_blocks"), stats.get("kv_total_blocks")
    if type(active) is not int or active < 0:
        return None
    return active, total if type(total) is int and total > 0 else None
