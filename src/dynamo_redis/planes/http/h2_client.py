"""A connection of HTTP/2 to one server, on the protocol library h2.

Each exchange is a stream of the connection. Received bytes are acknowledged once they are read, so a reader
that is slow holds up its own exchange. A PING is sent in each keepalive interval; a server that does not
answer it within the keepalive time-out is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterable, Callable
from contextlib import suppress
from typing import Any, ClassVar, Final, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from h2.connection import ConnectionInputs, ConnectionState, H2ConnectionStateMachine
from h2.settings import SettingCodes, Settings

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConnectionLost, Draining, PeerSilent, PlaneError

_WIDE_WINDOW_BYTES: Final = 1 << 20
_WIDE_CONNECTION_BYTES: Final = 1 << 24
_PLAIN_WINDOW_BYTES: Final = 65_535
_MAX_HEADERS_BYTES: Final = 64 << 10
_LINGER_S: Final = 1.0
"""Seconds that a closing connection may take to hand over the written bytes."""
_RESET_REASONS: Final[dict[int, str]] = {
    int(h2.errors.ErrorCodes.REFUSED_STREAM): "the server refused the stream",
    int(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM): "the server asks for fewer requests",
}

Headers = list[tuple[str, str]]

logging.getLogger("hpack").setLevel(logging.WARNING)  # at DEBUG it writes each header, tokens too


class _StateMachine(H2ConnectionStateMachine):
    """Lets exchanges go on behind a GOAWAY, as HTTP/2 has it; for h2 it is the end of the connection."""

    def __init__(self) -> None:
        super().__init__()
        going = ConnectionState.CLIENT_OPEN, ConnectionInputs.RECV_GOAWAY
        self._transitions = {**self._transitions, going: (None, ConnectionState.CLIENT_OPEN)}


class Exchange:
    """One request and its answer. One task reads it."""

    __slots__ = (
        "_chunks", "_connection", "_ended", "_error", "_waiter", "headers", "is_sent", "status", "stream_id",
        "window_waiter",
    )  # fmt: skip

    def __init__(self, connection: H2ClientConnection, stream_id: int) -> None:
        self._connection = connection
        self._chunks: deque[tuple[bytes, int]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: PlaneError | None = None
        self.stream_id = stream_id
        self.is_sent = False
        """True if `begin` has sent the whole request."""
        self.status: int | None = None
        """The status, once the head of the answer has come."""
        self.headers: dict[str, str] = {}
        """The head of the answer."""
        self.window_waiter: asyncio.Future[None] | None = None

    async def wait_status(self) -> int:
        """Wait for the head of the answer; return the status. Raises PlaneError."""
        while self.status is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise ConnectionLost("the answer ended without a head")
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """Return the next bytes of the answer, all that are there; empty at its end. Raises PlaneError."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            await self._wait()
        data = b"".join([chunk for chunk, _ in self._chunks])
        self._drop_chunks()
        return data

    def _drop_chunks(self) -> None:
        """Give the server room again for the received bytes."""
        size_bytes = sum(size for _, size in self._chunks)
        self._chunks.clear()
        self._connection.acknowledge(self.stream_id, size_bytes)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Let the reader look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def wake_writer(self) -> None:
        """Let the writer look again for room."""
        if self.window_waiter is not None and not self.window_waiter.done():
            self.window_waiter.set_result(None)

    def on_head(self, headers: dict[str, str]) -> None:
        """Take the head of the answer."""
        self.headers = headers
        status = headers.get(":status", "")
        self.status = int(status) if status.isdigit() else 0
        self.wake()

    def on_data(self, data: bytes, size_bytes: int) -> None:
        """Take received bytes; `size_bytes` is what they cost of the window."""
        if data:  # a frame of DATA may be empty, and is not the end then
            self._chunks.append((data, size_bytes))
            self.wake()
        else:
            self._connection.acknowledge(self.stream_id, size_bytes)

    def on_end(self, error: PlaneError | None = None) -> None:
        """End the answer; with an error, if it is not complete."""
        if not self._ended:
            self._ended = True
            self._error = error
            self.wake_writer()
            self.wake()

    @property
    def has_ended(self) -> bool:
        """True once no more bytes of the answer come."""
        return self._ended

    def close(self) -> None:
        """Reset the stream, unless the answer has ended. Idempotent."""
        self._drop_chunks()  # they take room from the connection's other exchanges
        self._connection.close_exchange(self)


class H2ClientConnection(asyncio.Protocol):
    """A connection with its exchanges. For the event loop's thread."""

    def __init__(self, settings: PlaneSettings, authority: str, scheme: str) -> None:
        self._settings = settings
        self._authority = authority
        self._scheme = scheme
        self._loop = asyncio.get_running_loop()
        config = h2.config.H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )  # fmt: skip
        self._h2 = h2.connection.H2Connection(config)
        self._h2.state_machine = _StateMachine()
        self._transport: asyncio.Transport | None = None
        self._exchanges: dict[int, Exchange] = {}
        self._flush_scheduled = False
        self._paused: asyncio.Future[None] | None = None
        self._keepalive: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._heard_at = self._loop.time()
        self._pinged_at: float | None = None
        self._is_going = False
        self._error: PlaneError | None = None
        self.idle_since = self._loop.time()

    @property
    def is_usable(self) -> bool:
        """True while an exchange may begin."""
        if self._is_going or self._error is not None:
            return False
        limit = min(
            self._settings.http2_max_concurrent_streams, self._h2.remote_settings.max_concurrent_streams
        )
        return len(self._exchanges) < limit

    @property
    def exchange_count(self) -> int:
        """Count of open exchanges."""
        return len(self._exchanges)

    @property
    def has_ended(self) -> bool:
        """True once the connection is closed, or will be."""
        return self._error is not None or (self._is_going and not self._exchanges)

    # ------------------------------------------------------------------- callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        is_wide = self._settings.http2_adaptive_window
        window_bytes = _WIDE_WINDOW_BYTES if is_wide else _PLAIN_WINDOW_BYTES
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: window_bytes,
                SettingCodes.MAX_FRAME_SIZE: int(self._settings.http2_max_frame_bytes),
                SettingCodes.MAX_HEADER_LIST_SIZE: _MAX_HEADERS_BYTES,
            },
        )
        # h2 takes these from its own defaults, and not from given settings.
        self._h2.max_inbound_frame_size = self._h2.local_settings.max_frame_size
        self._h2.incoming_buffer.max_frame_size = self._h2.local_settings.max_frame_size
        self._h2.initiate_connection()
        if is_wide:
            self._h2.increment_flow_control_window(_WIDE_CONNECTION_BYTES - _PLAIN_WINDOW_BYTES)
        self._flush()
        self._keepalive = self._loop.call_later(self._settings.http2_keep_alive_interval_s, self._keep_alive)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._flush()  # h2 drops unsent bytes at a GOAWAY
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError as exc:
            self._flush()
            self._end(ConnectionLost(f"the server breaks HTTP/2: {exc}"))
            return
        for event in events:
            self._on_event(event)
        self._schedule_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc is not None else ""
        self._end(ConnectionLost(f"the connection broke{reason}"))
        if self._abort_timer is not None:
            self._abort_timer.cancel()

    def pause_writing(self) -> None:
        self._paused = self._loop.create_future()

    def resume_writing(self) -> None:
        paused, self._paused = self._paused, None
        if paused is not None and not paused.done():
            paused.set_result(None)

    # ------------------------------------------------------------------- events

    def _on_event(self, event: h2.events.Event) -> None:
        handle = self._HANDLERS.get(type(event))
        if handle is not None:
            handle(self, event)

    def _on_data(self, event: h2.events.DataReceived) -> None:
        exchange = self._exchanges.get(event.stream_id)
        if exchange is not None:
            exchange.on_data(event.data, event.flow_controlled_length)
        else:  # of an exchange that was closed here
            self.acknowledge(event.stream_id, event.flow_controlled_length)

    def _on_head(self, event: h2.events.ResponseReceived) -> None:
        exchange = self._exchanges.get(event.stream_id)
        if exchange is not None:
            exchange.on_head({str(name): str(value) for name, value in event.headers})

    def _on_end(self, event: h2.events.StreamEnded) -> None:
        self._finish(event.stream_id, None)

    def _on_reset(self, event: h2.events.StreamReset) -> None:
        reason = _RESET_REASONS.get(event.error_code, f"the server reset the stream ({event.error_code})")
        self._finish(event.stream_id, ConnectionLost(reason))

    def _on_room(self, event: h2.events.WindowUpdated | h2.events.RemoteSettingsChanged) -> None:
        """Let exchanges go on that wait for room."""
        stream_id = event.stream_id if isinstance(event, h2.events.WindowUpdated) else 0
        waiting = [self._exchanges.get(stream_id)] if stream_id else list(self._exchanges.values())
        for exchange in waiting:
            if exchange is not None:
                exchange.wake_writer()

    def _on_ping_answer(self, _: h2.events.PingAckReceived) -> None:
        self._pinged_at = None

    def _on_goaway(self, event: h2.events.ConnectionTerminated) -> None:
        """Begin no more exchanges; end those that the server will not handle."""
        self._is_going = True
        last = event.last_stream_id or 0
        for stream_id, exchange in tuple(self._exchanges.items()):
            if stream_id > last:
                del self._exchanges[stream_id]
                exchange.on_end(Draining("the server is shutting down"))
        if not self._exchanges:
            self.close()

    def _finish(self, stream_id: int | None, error: PlaneError | None) -> None:
        exchange = self._exchanges.pop(stream_id or 0, None)
        if exchange is not None:
            exchange.on_end(error)
        if not self._exchanges:
            self.idle_since = self._loop.time()
            if self._is_going:
                self.close()

    # ------------------------------------------------------------------- requests

    def begin(self, path: str, headers: Headers, body: bytes | None) -> Exchange:
        """Begin a POST, with its whole body or with None for one that `send_body` sends. Raises
        ConnectionLost."""
        if self._error is not None:
            raise self._error
        try:
            stream_id = self._h2.get_next_available_stream_id()
            head = [
                (":method", "POST"),
                (":scheme", self._scheme),
                (":authority", self._authority),
                (":path", path),
                *headers,
            ]
            self._h2.send_headers(stream_id, head, end_stream=body == b"")
        except h2.exceptions.ProtocolError as exc:
            self._is_going = True
            raise ConnectionLost(f"no request can begin on this connection: {exc}") from exc
        exchange = self._exchanges[stream_id] = Exchange(self, stream_id)
        if body and len(body) <= self._room(stream_id):
            self._h2.send_data(stream_id, body, end_stream=True)
            exchange.is_sent = True
        elif body == b"":
            exchange.is_sent = True
        self._schedule_flush()
        return exchange

    def _room(self, stream_id: int) -> int:
        return min(self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size)

    async def send_body(self, exchange: Exchange, parts: AsyncIterable[bytes]) -> None:
        """Send the parts of a body, at the server's pace, and its end. Returns early if the exchange ends."""
        async for part in parts:
            if not await self._send_part(exchange, part):
                return
        if exchange.stream_id in self._exchanges:
            self._end_body(exchange)

    async def send_whole(self, exchange: Exchange, body: bytes) -> None:
        """Send a body that did not fit at once, and its end."""
        if await self._send_part(exchange, body):
            self._end_body(exchange)

    def _end_body(self, exchange: Exchange) -> None:
        try:
            self._h2.end_stream(exchange.stream_id)
        except h2.exceptions.ProtocolError:
            return  # the server has ended the stream meanwhile
        self._schedule_flush()

    async def _send_part(self, exchange: Exchange, part: bytes) -> bool:
        """Send bytes under flow control. Return False if the exchange has ended."""
        view, stream_id = memoryview(part), exchange.stream_id
        while view:
            if exchange.has_ended or stream_id not in self._exchanges:
                return False
            if self._paused is not None:
                await asyncio.shield(self._paused)
                continue
            room_bytes = self._room(stream_id)
            if room_bytes <= 0:
                exchange.window_waiter = self._loop.create_future()
                self._flush()
                try:
                    await exchange.window_waiter
                finally:
                    exchange.window_waiter = None
                continue
            self._h2.send_data(stream_id, bytes(view[:room_bytes]))
            view = view[room_bytes:]
            self._flush()
        return not exchange.has_ended and stream_id in self._exchanges

    def acknowledge(self, stream_id: int, size_bytes: int) -> None:
        """Give the server room for as many bytes as have been read."""
        if size_bytes and self._error is None:
            try:
                self._h2.acknowledge_received_data(size_bytes, stream_id)
            except h2.exceptions.ProtocolError:
                return
            self._schedule_flush()

    def close_exchange(self, exchange: Exchange) -> None:
        """Reset an exchange that is not wanted any more."""
        if self._exchanges.get(exchange.stream_id) is exchange:
            with suppress(h2.exceptions.ProtocolError):
                self._h2.reset_stream(exchange.stream_id, h2.errors.ErrorCodes.CANCEL)
            self._schedule_flush()
            self._finish(exchange.stream_id, ConnectionLost("the exchange was closed"))

    # ------------------------------------------------------------------- writing, keepalive, the end

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._transport is not None and self._error is None:
            if self._transport.is_closing():  # uvloop raises on a write, until it has called connection_lost
                self._end(ConnectionLost("the connection broke"))
                return
            data = self._h2.data_to_send()
            if data:
                self._transport.write(data)

    def _keep_alive(self) -> None:
        """Send a PING in a quiet interval while exchanges are open; give up a server that answers none."""
        now = self._loop.time()
        interval_s, timeout_s = (
            self._settings.http2_keep_alive_interval_s,
            self._settings.http2_keep_alive_timeout_s,
        )
        wait_s = interval_s
        if self._pinged_at is not None and self._heard_at < self._pinged_at:
            left_s = self._pinged_at + timeout_s - now
            if left_s <= 0:
                self._end(PeerSilent(f"the server has been silent for {now - self._heard_at:.1f} s"))
                return
            wait_s = left_s
        elif self._exchanges and now - self._heard_at >= interval_s:
            self._pinged_at = now
            self._h2.ping(b"keepaliv")
            self._flush()
            wait_s = timeout_s
        self._keepalive = self._loop.call_later(wait_s, self._keep_alive)

    def close(self) -> None:
        """Close the connection; open exchanges end. Idempotent."""
        if self._error is None:
            with suppress(h2.exceptions.ProtocolError):
                self._h2.close_connection()
            self._flush()
        self._end(ConnectionLost("the connection was closed"))

    def _end(self, error: PlaneError) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._keepalive is not None:
            self._keepalive.cancel()
        exchanges, self._exchanges = self._exchanges, {}
        for exchange in exchanges.values():
            exchange.on_end(error)
        self.resume_writing()
        if self._transport is not None:
            self._transport.close()
            self._abort_timer = self._loop.call_later(_LINGER_S, self._transport.abort)

    _HANDLERS: ClassVar[dict[type[h2.events.Event], Callable[[Any, Any], None]]] = {
        h2.events.DataReceived: _on_data,
        h2.events.ResponseReceived: _on_head,
        h2.events.StreamEnded: _on_end,
        h2.events.StreamReset: _on_reset,
        h2.events.WindowUpdated: _on_room,
        h2.events.RemoteSettingsChanged: _on_room,
        h2.events.PingAckReceived: _on_ping_answer,
        h2.events.ConnectionTerminated: _on_goaway,
    }
