"""The rival of suite `events`: JetStream by nats-py, with file storage.

A batch is a msgpack array in one message: each event is packed when it is published, and the batch when it is
full, as our publisher does. Messages that are read are not unpacked here.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgpack
import nats
from nats.js.api import ConsumerConfig, StorageType, StreamConfig

from benchmarks.events.rivals.peers import Peer
from benchmarks.events.workload import EVENT_BYTES, PULL_COUNT, STREAM, SUBJECT, event_bytes

PENDING_BYTES = 64 << 20
"""Limit of the client's send buffer, in bytes. With the default of 2 MiB each large message would wait."""
IN_FLIGHT_COUNT = 4000
"""Messages that are sent and not confirmed yet: nats-py's own default."""
IN_FLIGHT_BATCHES_COUNT = 64
HEAD_BYTES = 3
"""Bytes that msgpack puts before an event that is only bytes."""
_DURABLE = "reader"
_pack = msgpack.Packer(autoreset=True).pack


class JetStreamPeer:
    """One client, and a stream of its own."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._jetstream = client.jetstream(timeout=60)
        self._reader: Any = None

    async def create_stream(self) -> None:
        await self._jetstream.add_stream(
            StreamConfig(name=STREAM, subjects=[SUBJECT], storage=StorageType.FILE)
        )

    async def publish(self, count: int, batch_count: int) -> None:
        limit = IN_FLIGHT_COUNT if batch_count == 1 else IN_FLIGHT_BATCHES_COUNT
        jetstream = self._client.jetstream(timeout=60, publish_async_max_pending=limit)
        if batch_count == 1:
            for number in range(count):
                await jetstream.publish_async(SUBJECT, event_bytes(number))
        else:
            await self._publish_batches(jetstream, count, batch_count)
        await jetstream.publish_async_completed()

    async def _publish_batches(self, jetstream: Any, count: int, batch_count: int) -> None:
        packed: list[bytes] = []
        for number in range(count):
            packed.append(_pack(event_bytes(number)[HEAD_BYTES:]))
            if len(packed) == batch_count or number == count - 1:
                head = _pack([1, SUBJECT, 1, 1, 0, number, int(time.time() * 1000)])
                await jetstream.publish_async(SUBJECT, b"".join((head, *packed)))
                packed = []

    async def prepare(self) -> None:
        config = ConsumerConfig(max_ack_pending=4 * PULL_COUNT)
        self._reader = await self._jetstream.pull_subscribe(SUBJECT, durable=_DURABLE, config=config)

    async def consume(self, count: int, batch_count: int) -> None:
        left, at_once = count, max(1, PULL_COUNT // batch_count) if batch_count > 1 else PULL_COUNT
        while left:
            for message in await self._reader.fetch(min(at_once, -(-left // batch_count)), timeout=10):
                left -= len(message.data) // EVENT_BYTES  # the rest of a batch is much smaller than one event
                await message.ack()
        await self._client.flush()

    async def purge(self) -> None:
        if self._reader is not None:
            await self._reader.unsubscribe()
            await self._jetstream.delete_consumer(STREAM, _DURABLE)
            self._reader = None
        await self._jetstream.purge_stream(STREAM)

    async def aclose(self) -> None:
        await asyncio.wait_for(self._client.close(), 5)


async def connect(url: str) -> Peer:
    peer = JetStreamPeer(await nats.connect(url, pending_size=PENDING_BYTES))
    await peer.create_stream()
    return peer
