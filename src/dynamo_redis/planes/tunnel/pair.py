"""Two protocols of one process, connected to each other without a socket."""

from __future__ import annotations

import asyncio
import secrets
from functools import partial

from dynamo_redis.planes.tunnel.transport import TunnelTransport
from dynamo_redis.wire import tunnel

_CONTENT_BYTES = 256 << 10


def connect_pair(
    loop: asyncio.AbstractEventLoop, caller: asyncio.BufferedProtocol, server: asyncio.BufferedProtocol
) -> None:
    """Connect two protocols. Each gets its transport now, and the other's bytes from the next turn on."""
    ends: list[TunnelTransport] = []
    connection_id = secrets.token_bytes(tunnel.ID_BYTES)

    def deliver(receiver: int, message: bytes) -> None:
        ends[receiver].on_message(tunnel.decode(message))

    def send(receiver: int, message: bytes) -> None:
        loop.call_soon(deliver, receiver, message)

    for own, protocol in enumerate((server, caller)):
        ends.append(
            TunnelTransport(
                loop,
                connection_id,
                protocol,
                content_bytes=_CONTENT_BYTES,
                send=partial(send, 1 - own),
                on_end=lambda: None,
            )
        )
