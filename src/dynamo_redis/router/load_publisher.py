"""What a worker says of its load: fire and forget, the last value wins.

Two topics: `kv_metrics`, how full a rank's cache and batch are, and `forward_pass_metrics`, what its last
step computed. Each message is a batch of one event, the rank's present value.
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

log = logging.getLogger(__name__)

KV_METRICS: Final = "kv_metrics"
FORWARD_PASS_METRICS: Final = "forward_pass_metrics"  # noqa: S105  (no password)

LOAD_METRICS: Final = "load_metrics"
"""The endpoint, beside `generate`, that answers with one item a rank."""

INTERVAL_S: Final = 0.25
"""A value that changes all the time is told this often while Redis says that its topic has listeners."""

UNHEARD_S: Final = 1.0
"""It is told this often while Redis knows of no listener: one may have begun to listen, or listen at another
node of a cluster, of which the answer to PUBLISH says nothing."""

REPEAT_S: Final = 2.0
"""A value that does not change is told this often, for those that have begun to listen since."""

_AFTER_FAILURE_S: Final = 1.0


@dataclass(slots=True)
class _Value:
    event: dict[str, Any]
    told_at: float = float("-inf")
    is_new: bool = True
    told_count: int = 0


class LoadPublisher:
    """Tells the load of one instance's ranks. It owns one task, from `start` to `aclose`.

    Nothing queues: a value that has not been told yet gives way to the next one.
    """

    def __init__(self, streams: EventStreams, namespace: str, component: str, instance_id: int) -> None:
        self._streams = streams
        self._namespace = namespace
        self._component = component
        self._instance_id = instance_id
        self._epoch = secrets.randbits(63)
        self._values: dict[tuple[str, int], _Value] = {}  # by topic and rank
        self._heard: set[str] = set()  # topics whose last message had a receiver
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def tell(self, topic: str, dp_rank: int, event: dict[str, Any]) -> None:
        """This is the rank's value now. Returns at once."""
        value = self._values.get((topic, dp_rank))
        if value is None:
            self._values[topic, dp_rank] = _Value(event)
        elif value.event != event:
            value.event = event
            value.is_new = True
        else:
            return
        self._changed.set()

    def values(self, topic: str) -> list[dict[str, Any]]:
        """The present value of each rank."""
        return [value.event for (of, _), value in self._values.items() if of == topic]

    def start(self) -> None:
        """Begin to publish. Idempotent."""
        if self._task is None:
            name = f"load of {self._namespace}.{self._component}"
            self._task = asyncio.create_task(Supervisor(log, name).run(self._run), name=name)

    async def aclose(self) -> None:
        """Publish no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPEAT_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self._publish()
            except StoreError as exc:
                log.debug("the load of %s.%s was not told: %s", self._namespace, self._component, exc)
                await asyncio.sleep(_AFTER_FAILURE_S)
            else:
                await asyncio.sleep(INTERVAL_S)

    async def _publish(self) -> None:
        now = SYSTEM_CLOCK.monotonic()
        for (topic, dp_rank), value in tuple(self._values.items()):
            pause_s = REPEAT_S if not value.is_new else 0.0 if topic in self._heard else UNHEARD_S
            if now - value.told_at < pause_s:
                continue
            value.is_new = False
            value.told_at = now
            batch = EventBatch(
                topic,
                PublisherId(self._instance_id, self._epoch, dp_rank),
                value.told_count,
                int(SYSTEM_CLOCK.wall() * 1000),
                [value.event],
            )
            value.told_count += 1
            name = StreamName(self._namespace, self._component, topic)
            if await self._streams.publish(name, batch.to_bytes()):
                self._heard.add(topic)
            else:
                self._heard.discard(topic)
