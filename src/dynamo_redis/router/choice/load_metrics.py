"""Reads the workers' own reports of their load. Each report replaces the one before; an old one expires."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

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
"""Age at which a worker's last report expires: then its bookings alone count."""

_LISTEN_S = 1.0


class LoadMetrics:
    """The blocks in use in the workers' KV caches, as they report them: they correct the load book.

    It owns one task, which listens to the topic from `start` to `aclose`. A report that is published while it
    does not listen is lost; the next one follows a moment later.
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
        self._used: dict[Worker, tuple[int, int | None, float]] = {}  # blocks in use, all blocks, time
        self._reader: asyncio.Task[None] | None = None
        self._started_at = float("inf")
        self._is_closed = False
        self._supervisor = Supervisor(log, f"load metrics {self._topic.path}")

    @property
    def has_listened(self) -> bool:
        """True once every worker that reports its load has been heard."""
        return self._clock.monotonic() - self._started_at > STALE_AFTER_S

    def start(self) -> None:
        """Begin to listen. Idempotent; no effect after `aclose`."""

        async def listen() -> None:
            subscription = await self._streams.subscribe(self._topic)
            try:
                while True:
                    message = await subscription.next(_LISTEN_S)
                    if message is not None:
                        self.apply(message)
            finally:
                await subscription.aclose()

        if self._reader is None and not self._is_closed:
            self._started_at = self._clock.monotonic()
            self._reader = asyncio.create_task(
                self._supervisor.run(listen), name=f"load metrics {self._topic.path}"
            )

    async def aclose(self) -> None:
        """Stop listening."""
        self._is_closed = True
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def used_blocks(self, worker: Worker) -> tuple[int, int | None] | None:
        """Return the KV blocks that a worker's requests hold, and the number of all its blocks if it reports
        that; None without a report that counts."""
        known = self._used.get(worker)
        if known is None or self._clock.monotonic() - known[2] > STALE_AFTER_S:
            return None
        return known[:2]

    def expire(self) -> None:
        """Forget the reports that have expired."""
        oldest = self._clock.monotonic() - STALE_AFTER_S
        for worker in [worker for worker, (_, _, at) in self._used.items() if at < oldest]:
            del self._used[worker]
            self._book.forget_report(worker)

    def apply(self, message: bytes) -> None:
        """Apply one message; one that cannot be read is skipped, and named in the log."""
        try:
            batch = EventBatch.from_bytes(message)
        except InvalidRecord as exc:
            self._supervisor.skip(f"a message of {self._topic.path}", exc)
            return
        worker = Worker(batch.publisher.instance_id, batch.publisher.dp_rank)
        for event in batch.events:
            stats = event.get("kv_stats") if isinstance(event, dict) else None
            if not isinstance(stats, dict):
                continue
            active, total = stats.get("kv_active_blocks"), stats.get("kv_total_blocks")
            if type(active) is not int or active < 0:
                continue
            known_total = total if type(total) is int and total > 0 else None
            self._used[worker] = (active, known_total, self._clock.monotonic())
            self._book.report(worker, active)
        self._on_change()
