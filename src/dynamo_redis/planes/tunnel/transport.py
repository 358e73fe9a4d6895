"""One connection through a broker, as a transport of asyncio.

Written bytes are cut into messages. Each side tells how many bytes it has taken, and may be ahead of the
other by `WINDOW_BYTES`: so a reader that is slow holds up its own connection, and neither the broker nor
another connection. A message that is missing ends the connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from dynamo_redis.wire.tunnel import WINDOW_BYTES, Kind, Message, encode_head

_REPORT_BYTES: Final = WINDOW_BYTES // 4
"""Bytes taken after which the peer is told."""

Buffer = bytes | bytearray | memoryview


class TunnelTransport(asyncio.Transport):
    """Bytes of one connection to messages, and back. For the event loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection_id: bytes,
        protocol: asyncio.BufferedProtocol,
        *,
        content_bytes: int,
        send: Callable[[bytes], None],
        on_end: Callable[[], object],
    ) -> None:
        """Make a transport, and tell the protocol.

        Args:
            loop: the event loop.
            connection_id: the connection's id.
            protocol: reads and writes the bytes.
            content_bytes: the most bytes of one message.
            send: sends a message to the peer; never waits.
            on_end: is called once, when the connection has ended.
        """
        super().__init__()
        self._loop = loop
        self._id = connection_id
        self._protocol = protocol
        self._content_bytes = min(content_bytes, _REPORT_BYTES)
        self._send = send
        self._on_end = on_end
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._high_bytes = 64 << 10
        self._sent_bytes = self._sent_count = 0
        self._peer_taken_bytes = 0
        self._held: deque[memoryview] = deque()  # received, while reading is paused
        self._taken_bytes = self._reported_bytes = 0
        self._received_count = self._received_bytes = 0
        self._is_reading = True
        self._is_writer_paused = False
        self._is_closing = False
        self._is_peer_done = False
        self._has_ended = False
        protocol.connection_made(self)

    # ------------------------------------------------------------------- writing

    def write(self, data: Buffer) -> None:
        """Send bytes; what the peer has no room for waits."""
        self.writelines((data,))

    def writelines(self, list_of_data: Any) -> None:
        """Send several pieces as `write`."""
        if self._is_closing or self._has_ended:
            return
        for data in list_of_data:
            if data:
                # A bytearray may change after the call.
                self._out.append(memoryview(bytes(data) if isinstance(data, bytearray) else data))
                self._out_bytes += len(data)
        self._send_waiting()
        if self._out_bytes > self._high_bytes and not self._is_writer_paused:
            self._is_writer_paused = True
            self._protocol.pause_writing()

    def _send_waiting(self) -> None:
        """Send the waiting bytes for which the peer has room."""
        while self._out and not self._has_ended:
            room_bytes = min(self._content_bytes, WINDOW_BYTES - (self._sent_bytes - self._peer_taken_bytes))
            if room_bytes <= 0:
                return
            parts: list[Buffer] = [encode_head(Kind.DATA, self._id, self._sent_count)]
            size_bytes = 0
            while self._out and size_bytes < room_bytes:
                data = self._out.popleft()
                left_bytes = room_bytes - size_bytes
                if len(data) > left_bytes:
                    self._out.appendleft(data[left_bytes:])
                    data = data[:left_bytes]
                parts.append(data)
                size_bytes += len(data)
            self._sent_count += 1
            self._sent_bytes += size_bytes
            self._out_bytes -= size_bytes
            self._send(b"".join(parts))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Pause the protocol's writing above `high` waiting bytes, until none waits any more."""
        self._high_bytes = (64 << 10) if high is None else high

    def get_write_buffer_size(self) -> int:
        """Return the bytes that wait."""
        return self._out_bytes

    def can_write_eof(self) -> bool:
        """Return False: a connection ends in both directions."""
        return False

    # ------------------------------------------------------------------- reading

    def on_message(self, message: Message) -> None:
        """Handle a message of the peer."""
        kind, _, number, content = message
        if self._has_ended:
            return
        if kind is Kind.DATA:
            if number != self._received_count or self._is_peer_done:
                self._break(ConnectionResetError("messages of the connection were lost"))
                return
            self._received_count += 1
            self._received_bytes += len(content)
            if self._received_bytes - self._reported_bytes > WINDOW_BYTES:
                self._break(ConnectionResetError("the peer sent more than there was room for"))
                return
            self._held.append(content)
            self._deliver()
        elif kind is Kind.TAKEN:
            if number > self._peer_taken_bytes:
                self._peer_taken_bytes = min(number, self._sent_bytes)
                self._send_waiting()
                self._after_sending()
        elif kind is Kind.CLOSE:
            if number != self._received_count:
                self._break(ConnectionResetError("messages of the connection were lost"))
                return
            self._is_peer_done = True
            self._deliver()
        elif kind is Kind.RESET and not self._is_peer_done:  # else its bytes have all come, if unread
            self.end(ConnectionResetError("the peer ended the connection"))

    def _deliver(self) -> None:
        """Hand the held bytes to the protocol, unless reading is paused; then the end of the peer's bytes."""
        while self._held and (self._is_reading or self._is_closing):
            data = self._held.popleft()
            size_bytes = len(data)
            while data and not self._is_closing:
                # Released before the protocol goes on: it may drop the buffer that this is a view of.
                with memoryview(self._protocol.get_buffer(len(data))) as buffer:
                    part_bytes = min(len(buffer), len(data))
                    buffer[:part_bytes] = data[:part_bytes]
                self._protocol.buffer_updated(part_bytes)
                data = data[part_bytes:]
            self._taken_bytes += size_bytes
            if self._has_ended:
                return
            if self._taken_bytes - self._reported_bytes >= _REPORT_BYTES:
                self.report()
        if self._is_peer_done and not self._held and not self._has_ended:
            if not self._is_closing:
                self._protocol.eof_received()
            self.end(None)  # bytes that still wait have no reader: the peer ended in both directions

    def report(self) -> None:
        """Tell the peer how many bytes have been taken."""
        self._reported_bytes = self._taken_bytes
        self._send(encode_head(Kind.TAKEN, self._id, self._taken_bytes))

    def pause_reading(self) -> None:
        """Hand no bytes to the protocol until `resume_reading`."""
        self._is_reading = False

    def resume_reading(self) -> None:
        """Hand bytes to the protocol again, from the next turn of the event loop."""
        if not self._is_reading:
            self._is_reading = True
            self._loop.call_soon(self._deliver)

    def is_reading(self) -> bool:
        """Return whether bytes are handed to the protocol."""
        return self._is_reading and not self._is_closing

    # ------------------------------------------------------------------- the end

    def is_closing(self) -> bool:
        """Return whether the connection is closing or has ended."""
        return self._is_closing or self._has_ended

    def close(self) -> None:
        """End the connection once the waiting bytes are sent. Idempotent."""
        if not self._is_closing and not self._has_ended:
            self._is_closing = True
            self._after_sending()

    def _after_sending(self) -> None:
        """If no byte waits: end a closing connection, or resume the protocol's writing."""
        if self._out or self._has_ended:
            return
        if self._is_closing:
            self._send(encode_head(Kind.CLOSE, self._id, self._sent_count))
            self.end(None)
        elif self._is_writer_paused:
            self._is_writer_paused = False
            self._protocol.resume_writing()

    def abort(self) -> None:
        """End the connection now. Idempotent."""
        if not self._has_ended:
            self._break(None)

    def _break(self, error: Exception | None) -> None:
        if not self._is_peer_done:
            self._send(encode_head(Kind.RESET, self._id, 0))
        self.end(error)

    def end(self, error: Exception | None) -> None:
        """End the connection without a message. Idempotent."""
        if self._has_ended:
            return
        self._has_ended = self._is_closing = True
        self._out.clear()
        self._held.clear()
        self._out_bytes = 0
        self._on_end()
        self._loop.call_soon(self._protocol.connection_lost, error)
