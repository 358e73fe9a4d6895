"""nats-py, through a nats-server; a stream is an inbox, a message an item, an empty one its end.

The caller reads a stream as the documentation shows it, `async for message in subscription.messages`, or,
with the argument `callback`, through a callback and a queue of its own: that iterator makes a task for each
message.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import nats

from benchmarks.request.rivals.peer import STREAMS, Announce, Peer
from benchmarks.request.workloads import KINDS, Kind

TIMEOUT_S: Final = 60.0
PENDING_BYTES: Final = 64 << 20
"""Limit of the client's send buffer, in bytes. With the default of 2 MiB each large message would wait."""


async def serve(announce: Announce, url: str) -> None:
    """Subscribe each kind. Streams run beside one another, unlike the callbacks of one subscription."""
    client = await nats.connect(url, pending_size=PENDING_BYTES)
    running: set[asyncio.Task[None]] = set()

    async def echo(message: Any) -> None:
        await message.respond(message.data)

    async def answer(kind: Kind, message: Any) -> None:
        async for item in STREAMS[kind](int(message.data)):
            await client.publish(message.reply, item)
        await client.publish(message.reply, b"")

    async def start(message: Any) -> None:
        task = asyncio.create_task(answer(message.subject, message))
        running.add(task)
        task.add_done_callback(running.discard)

    for kind in KINDS:
        await client.subscribe(kind, cb=echo if kind == "echo" else start)
    await client.flush()
    announce(url)
    await asyncio.Event().wait()


class NatsPeer(Peer):
    """One connection to the server."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def echo(self, payload: bytes) -> Any:
        return (await self._client.request("echo", payload, timeout=TIMEOUT_S)).data

    async def stream(self, kind: Kind, count: int) -> int:
        seen = 0
        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox)
        await self._client.publish(kind, b"%d" % count, reply=inbox)
        async for message in subscription.messages:
            if not message.data:
                break
            seen += 1
        await subscription.unsubscribe()
        return seen


class CallbackPeer(NatsPeer):
    """Reads streams by a callback, the quicker way."""

    async def stream(self, kind: Kind, count: int) -> int:
        seen = 0
        items: asyncio.Queue[bytes] = asyncio.Queue()

        async def on_message(message: Any) -> None:
            items.put_nowait(message.data)

        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox, cb=on_message)
        await self._client.publish(kind, b"%d" % count, reply=inbox)
        while await items.get():
            seen += 1
        await subscription.unsubscribe()
        return seen


async def connect(url: str, how: str = "messages") -> NatsPeer:
    """Connect to the server that the serving process subscribes at."""
    client = await nats.connect(url, pending_size=PENDING_BYTES)
    return CallbackPeer(client) if how == "callback" else NatsPeer(client)
