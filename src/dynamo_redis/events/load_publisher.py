"""Publishes a worker's load: without storing it, the last value wins.

There are two topics: `kv_metrics`, the use of a rank's cache and batch, and `forward_pass_metrics`, the work
of its last step. Each message is a batch of one event, the rank's present value.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import StoreError
from dynamo_redis.store.event_base import EventStreams, StreamName
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.topics import FORWARD_PASS_METRICS, KV_METRICS

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25
"""Shortest time between two messages of a value that changes, while its topic has listeners: Redis returns
their number with each message."""

UNHEARD_S: Final = 1.0
"""The same while no listener is known. One may have begun to listen."""

REPEAT_S: Final = 2.0
"""Time after which a value that has not changed is sent again, for new listeners."""

_AFTER_FAILURE_S: Final = 1.0


@dataclass(slots=True)
class _Value:
    """The present value of a topic and rank."""

    event: dict[str, Any]
    sent_at: float = float("-inf")
    is_new: bool = True
    sent_count: int = 0


class LoadPublisher:
    """Publishes the load of one instance's ranks. It owns a task, from `start` to `aclose`.

    There is no queue: a value that has not been sent yet is replaced by the next one.
    """

    def __init__(self, streams: EventStreams, namespace: str, component: str, instance_id: int) -> None:
        self._streams = streams
        self._namespace = namespace
        self._component = component
        self._instance_id = instance_id
        self._epoch = secrets.randbits(63)
        self._values: dict[tuple[str, int], _Value] = {}  # by topic and rank
        self._heard: set[str] = set()  # topics whose last message had a listener
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def set_value(self, topic: str, dp_rank: int, event: dict[str, Any]) -> None:
        """Set the rank's present value, to be sent soon. Returns at once."""
        value = self._values.get((topic, dp_rank))
        if value is None:
            self._values[topic, dp_rank] = _Value(event)
        elif value.event != event:
            value.event = event
            value.is_new = True
        else:
            return
        self._changed.set()

    def forget(self, dp_rank: int) -> None:
        """Send the rank's last values no more, because its load is not known."""
        for topic in (KV_METRICS, FORWARD_PASS_METRICS):
            self._values.pop((topic, dp_rank), None)

    def values(self, topic: str) -> list[dict[str, Any]]:
        """Return the present value of each rank."""
        return [value.event for (of, _), value in self._values.items() if of == topic]

    def start(self) -> None:
        """Begin to publish. Idempotent."""

        async def publish_on() -> None:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(REPEAT_S):
                        await self._changed.wait()
                self._changed.clear()
                try:
                    await self._publish()
                except StoreError as exc:
                    log.debug("the load of %s.%s was not sent: %s", self._namespace, self._component, exc)
                    await asyncio.sleep(_AFTER_FAILURE_S)
                else:
                    await asyncio.sleep(INTERVAL_S)

        if self._task is None:
            name = f"load of {self._namespace}.{self._component}"
            self._task = asyncio.create_task(Supervisor(log, name).run(publish_on), name=name)

    async def aclose(self) -> None:
        """Stop publishing. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _publish(self) -> None:
        """Send the values that are due."""
        now = SYSTEM_CLOCK.monotonic()
        for (topic, dp_rank), value in tuple(self._values.items()):
            pause_s = REPEAT_S if not value.is_new else 0.0 if topic in self._heard else UNHEARD_S
            if now - value.sent_at < pause_s:
                continue
            value.is_new = False
            value.sent_at = now
            batch = EventBatch(
                topic,
                PublisherId(self._instance_id, self._epoch, dp_rank),
                value.sent_count,
                int(SYSTEM_CLOCK.wall() * 1000),
                [value.event],
            )
            value.sent_count += 1
            name = StreamName(self._namespace, self._component, topic)
            if await self._streams.publish(name, batch.to_bytes()):
                self._heard.add(topic)
            else:
                self._heard.discard(topic)
