"""The sockets to an engine's KV events: a subscriber for new messages, and the replay of past ones.

The only importer of ZeroMQ (`pip install dynamo-redis[engines]`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from dynamo_redis.events.engine_zmq.wire import END_OF_REPLAY, replay_request, split_message

_QUEUE_COUNT: Final = 20_000
"""The most unread messages. Then TCP pushes back, the engine drops messages at its own high-water mark, and
the sequence shows the gap."""

_REPLAY_QUEUE_COUNT: Final = 100_000
"""The most unread messages of one replay. Engines keep and send 10,000 by default."""

_MAX_MESSAGE_BYTES: Final = 64 << 20
_RECONNECT_MS, _RECONNECT_MAX_MS = 100, 3000
_HEARTBEAT_MS = 5000
_ANSWER_S: Final = 2.0
"""Seconds without a message after which a replay fails."""

_UP: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED
_DOWN: Final = zmq.EVENT_DISCONNECTED


class EventSubscriber:
    """The subscriber to one rank's messages. It reconnects by itself, without limit."""

    def __init__(self, endpoint: str, topic: str) -> None:
        """Start to connect. Raises ValueError for an invalid endpoint."""
        self.endpoint = endpoint
        self.connected = False
        self.connection_count = 0
        self._socket = _open(zmq.SUB, _QUEUE_COUNT)
        # A longer message comes from a broken peer: the connection is closed before memory is allocated.
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self._socket.subscribe(topic)
        self._monitor: Any = self._socket.get_monitor_socket(_UP | _DOWN)
        self._poller = zmq.asyncio.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            _connect(self._socket, endpoint)
        except ValueError:
            self.close()
            raise

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a message or a change of the connection; return False after `timeout_s`."""
        return bool(await self._poller.poll(int(timeout_s * 1000)))

    async def update_connection(self) -> None:
        """Update `connected` and `connection_count`."""
        while (frames := await _receive_now(self._monitor)) is not None:
            self.connected = parse_monitor_message(frames)["event"] == _UP
            self.connection_count += self.connected

    async def receive_now(self) -> list[bytes] | None:
        """Return the next message, or None if there is none now. Neither waits nor lets other tasks run."""
        return await _receive_now(self._socket)

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)


async def replay(
    endpoint: str, first_sequence: int, deadline: float
) -> AsyncGenerator[tuple[int, bytes], None]:
    """Yield the messages from that sequence on that the engine still has, as (sequence, payload).

    Messages that have arrived are yielded without letting other tasks run. Raises TimeoutError if the end
    does not arrive before `deadline`, a time of the event loop's clock, and ValueError for an invalid
    message.
    """
    loop = asyncio.get_running_loop()
    socket = _open(zmq.DEALER, _REPLAY_QUEUE_COUNT)
    try:
        _connect(socket, endpoint)
        await asyncio.wait_for(socket.send_multipart(replay_request(first_sequence)), _ANSWER_S)
        while True:
            frames = await _receive_now(socket)
            if frames is None:
                left_s = min(deadline - loop.time(), _ANSWER_S)
                if left_s <= 0 or not await socket.poll(int(left_s * 1000)):
                    raise TimeoutError
                continue
            sequence, payload = split_message(frames)
            if sequence == END_OF_REPLAY:
                return
            yield sequence, payload
    finally:
        socket.close(linger=0)


def _open(kind: int, queue_count: int) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.setsockopt(zmq.RCVHWM, queue_count)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * _HEARTBEAT_MS)
    return socket


def _connect(socket: zmq.asyncio.Socket, endpoint: str) -> None:
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as exc:
        raise ValueError(f"{endpoint} is not an address to connect to: {exc}") from exc


async def _receive_now(socket: Any) -> list[bytes] | None:
    try:
        frames: list[bytes] = await socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    return frames
