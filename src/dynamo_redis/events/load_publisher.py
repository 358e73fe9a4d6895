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
from dynamo_redis.errors import InvalidRecord, StoreError
from dynamo_redis.events.router_record import RouterRecord
from dynamo_redis.names import kv_routers_prefix
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.store.base import Put, Record, Registry, WatchBatch
from dynamo_redis.store.event_base import EventStreams, StreamName
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import EventBatch, PublisherId
from dynamo_redis.wire.topics import FORWARD_PASS_METRICS, KV_METRICS

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25
"""A value that changes all the time is told this often while its topic has listeners: Redis says so when it
is told, and routers that judge workers by `kv_metrics` stand in the registry."""

UNHEARD_S: Final = 1.0
"""It is told this often while no listener is known: others than routers may have begun to listen."""

REPEAT_S: Final = 2.0
"""A value that does not change is told this often, for those that have begun to listen since."""

_AFTER_FAILURE_S: Final = 1.0
_LISTENS_WITH: Final = "active_decode_blocks_threshold"
"""The setting of routers with which they listen."""


@dataclass(slots=True)
class _Value:
    event: dict[str, Any]
    told_at: float = float("-inf")
    is_new: bool = True
    told_count: int = 0


class LoadPublisher:
    """Tells the load of one instance's ranks. It owns two tasks, from `start` to `aclose`: one tells, one
    watches the routers' records.

    Nothing queues: a value that has not been told yet gives way to the next one.
    """

    def __init__(
        self, streams: EventStreams, registry: Registry, namespace: str, component: str, instance_id: int
    ) -> None:
        self._streams = streams
        self._registry = registry
        self._namespace = namespace
        self._component = component
        self._instance_id = instance_id
        self._epoch = secrets.randbits(63)
        self._values: dict[tuple[str, int], _Value] = {}  # by topic and rank
        self._heard: set[str] = set()  # topics whose last message had a receiver
        self._routers: set[str] = set()  # records of routers that listen to KV_METRICS
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._supervisor = Supervisor(log, f"listeners to the load of {namespace}.{component}")

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

    def forget(self, dp_rank: int) -> None:
        """Nothing is known of the rank's load: tell its last value no more."""
        for topic in (KV_METRICS, FORWARD_PASS_METRICS):
            self._values.pop((topic, dp_rank), None)

    def values(self, topic: str) -> list[dict[str, Any]]:
        """The present value of each rank."""
        return [value.event for (of, _), value in self._values.items() if of == topic]

    def start(self) -> None:
        """Begin to publish. Idempotent."""
        if not self._tasks:
            routers = kv_routers_prefix(self._namespace, self._component)
            for what, work in (
                ("load", Supervisor(log, f"load of {self._namespace}.{self._component}").run(self._run)),
                ("listeners", follow(self._registry, routers, self.note_routers, self._supervisor)),
            ):
                name = f"{what} of {self._namespace}.{self._component}"
                self._tasks.append(asyncio.create_task(work, name=name))

    async def aclose(self) -> None:
        """Publish no more. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def note_routers(self, batch: WatchBatch) -> None:
        """Note which routers listen."""
        for event in batch.events:
            if isinstance(event, Put) and self._listens(event.record):
                self._routers.add(event.record.key)
            else:
                self._routers.discard(key_of(event))

    def _listens(self, record: Record) -> bool:
        try:
            return RouterRecord.from_record(record).settings.get(_LISTENS_WITH) is not None
        except InvalidRecord as exc:
            self._supervisor.skip(record.key, exc)
            return True

    def _is_heard(self, topic: str) -> bool:
        return topic in self._heard or (topic == KV_METRICS and bool(self._routers))

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
            pause_s = REPEAT_S if not value.is_new else 0.0 if self._is_heard(topic) else UNHEARD_S
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
