"""One connection to an instance, at the caller: the handshake, the open streams, their frames."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, ClassVar, Final, Protocol

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import Draining, NotAccepted, PlaneError, ProtocolViolation, plane_error
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.frames.connection import (
    QUIET_AT,
    SWEEPS_PER_INTERVAL,
    WRITE_HIGH_WATER_BYTES,
    unacknowledged_bytes,
)
from dynamo_redis.planes.frames.response_stream import CallerConnection, FrameResponseStream
from dynamo_redis.wire import frame
from dynamo_redis.wire.decoder import ReadBuffers
from dynamo_redis.wire.frame import DATA, LAST
from dynamo_redis.wire.handshake import ClientHandshake
from dynamo_redis.wire.session import CLIENT_STEPS, ClientStream

IDLE_CLOSE_S: Final = 90.0
"""Seconds that a connection without requests stays open."""

LARGE_BYTES: Final = WRITE_HIGH_WATER_BYTES
"""A payload over this keeps a connection busy by itself."""

LIFE_TIMEOUT_S: Final = 2.0
"""Seconds that an instance may take to give a sign of life."""

_ANSWERED, _CLOSED = ClientStream.ANSWERED, ClientStream.CLOSED


class ConnectionOwner(Protocol):
    """The pool of a connection, which is notified of its events."""

    def on_closed(self, connection: ClientConnection) -> None:
        """Forget a connection that has ended."""
        ...

    def on_draining(self, error: Draining) -> None:
        """Note that the instance accepts no more requests."""
        ...

    def on_large_answer(self, subject: str) -> None:
        """Note an endpoint that answers a small request with a large item."""
        ...

    def on_quiet(self, connection: ClientConnection) -> None:
        """Handle an instance that is silent on a connection with pending requests."""
        ...

    async def ask_for_life(self) -> bool:
        """See `Carrier.ask_for_life`."""
        ...

    def resend(self, stream: FrameResponseStream) -> None:
        """Send a request again that was lost with a stale connection."""
        ...


class ClientConnection(CallerConnection):
    """A connection to one instance, with its open streams."""

    __slots__ = (
        "_accept_sweeps",
        "_accept_timeout_s",
        "_handshake",
        "_idle_from",
        "_idle_handle",
        "_last_stream_id",
        "_life_check",
        "_owner",
        "_ping_tokens",
        "_pings",
        "_unproven",
        "handshake_done",
        "receives_large",
        "usable",
    )

    # An instance that was switched off is avoided after three quarters to seven eighths of an interval; for
    # half an interval of this time it has not answered a PING. The server chooses no instance, so its PING
    # comes later.
    PING_AT: ClassVar[int] = 2
    _ASK_AT: ClassVar[int] = 5
    """Silent sweeps after which the instance is asked for a sign of life on another connection."""

    def __init__(
        self,
        owner: ConnectionOwner,
        target: Target,
        settings: PlaneSettings,
        loop: asyncio.AbstractEventLoop,
        buffers: ReadBuffers,
    ) -> None:
        super().__init__(
            loop,
            buffers,
            window_count=settings.channel_buffer_count,
            max_message_bytes=settings.max_message_bytes,
            keepalive_interval_s=settings.keepalive_interval_s,
        )
        self._owner = owner
        self._life_check: asyncio.Task[None] | None = None
        self._handshake: ClientHandshake | None = ClientHandshake(
            target.secret, settings.channel_buffer_count, target.instance_id
        )
        self._accept_timeout_s = settings.accept_timeout_s
        self._accept_sweeps = max(1, round(settings.accept_timeout_s / self._sweep_interval_s))
        self._last_stream_id = 0
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._ping_tokens = itertools.count(1 << 32)
        self._idle_handle: asyncio.TimerHandle | None = None
        self._idle_from = 0.0
        self._unproven: list[FrameResponseStream] | None = None
        self.streams: dict[int, FrameResponseStream] = {}
        self.usable = False
        """True while new streams may start here: from the handshake until the server drains, the stream ids
        are used up, or the connection ends."""
        self.receives_large = False
        """True while more than `LARGE_BYTES` of a payload are still to come, before any other answer."""
        self.handshake_done: asyncio.Future[None] = loop.create_future()

    # ------------------------------------------------------------------- requests

    @property
    def unsent_bytes(self) -> int:
        """Written bytes that the kernel has not taken yet, with those that wait for the next flush."""
        return super().unsent_bytes + sum(map(len, self._out))

    def send_request(self, stream: FrameResponseStream) -> None:
        """Start the stream on this connection: send its request."""
        self._last_stream_id = stream_id = self._last_stream_id + 1
        if stream_id >= frame.MAX_STREAM_ID:
            self.usable = False
        self.streams[stream_id] = stream
        if not self.sweeping:
            if self._loop.time() - self._idle_from > self._sweep_interval_s:
                self._unproven = []
            self.start_sweeping()
        stream.start(self, stream_id)
        if self._unproven is not None:
            self._unproven.append(stream)
        stream.waits_from_sweep = self.sweeps
        stream.ends_at_bytes = self.written_bytes

    def remove(self, stream: FrameResponseStream) -> None:
        """Forget a stream that has ended."""
        del self.streams[stream.stream_id]
        if not self.streams:
            if self._unproven:
                self._unproven.clear()  # all have ended, and the peer may answer none of them
            if not self.usable:
                self._loop.call_soon(self.close)

    @property
    def is_stale(self) -> bool:
        """True if the connection was idle before its present requests, and the peer has not answered any of
        them for `QUIET_AT` sweeps."""
        return self._unproven is not None and self._silent_sweeps >= QUIET_AT

    def resend_unproven(self) -> None:
        """Have requests sent again on a fresh connection, if no byte has come since the connection was idle.

        A firewall, a load balancer or the worker may have dropped an idle connection without notice; then the
        requests sent on it since are lost.
        """
        unproven, self._unproven = self._unproven, None
        self.usable = False
        for stream in unproven or ():
            if stream.rewind():
                del self.streams[stream.stream_id]
                self._owner.resend(stream)

    @property
    def is_pinged(self) -> bool:
        """True while a `ping` waits for its answer."""
        return bool(self._pings)

    async def ping(self) -> None:
        """Send a PING and wait for its answer. Raises ConnectionLost."""
        token = next(self._ping_tokens)
        self._pings[token] = answered = self._loop.create_future()
        try:
            self.send(frame.encode_ping(token))
            await answered
        finally:
            self._pings.pop(token, None)

    # ------------------------------------------------------------------- events of the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._handshake is not None
        self.transport.write(self._handshake.first_message())

    def eof_received(self) -> bool:
        if not self.closed:
            self.resend_unproven()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed:
            self.resend_unproven()
        super().connection_lost(exc)

    def on_handshake_bytes(self, data: memoryview) -> memoryview:
        handshake = self._handshake
        assert handshake is not None
        answer, rest = handshake.feed(data)
        if answer:
            self.transport.write(answer)
        server = handshake.server
        if server is not None:
            self._handshake = None
            self._ready = self.usable = True
            self.peer_window_count = server.window_count
            self.on_idle()
            if not self.handshake_done.done():
                self.handshake_done.set_result(None)
        return rest

    def on_handshake_failed(self, error: PlaneError) -> None:
        self.fail(error)

    def on_payload_progress(self) -> None:
        super().on_payload_progress()
        self.receives_large = self.decoder.missing_bytes > LARGE_BYTES
        if self.receives_large:
            stream = self.streams.get(self.decoder.raw_stream_id)
            if stream is not None and stream.payload_bytes <= LARGE_BYTES:
                self._owner.on_large_answer(stream.subject)

    def on_frames(self, frames: list[list[Any]]) -> None:
        self.receives_large = False
        self._unproven = None  # the peer has answered: its requests need no resending
        streams = self.streams
        # LAST and DATA, nearly all frames, need no table: every stream in `streams` accepts them.
        for received in frames:
            stream = streams.get(received[1])
            if stream is None:
                self._on_other(received)
            elif received[0] == LAST:
                stream.on_last(received[2])
            elif received[0] == DATA:
                stream.state = _ANSWERED
                stream.deliver(received[2])
            else:
                state = CLIENT_STEPS[stream.state].get(received[0])
                if state is None:
                    self._on_unlisted(received)
                    continue
                if state is not _CLOSED:  # the stream closes itself after it has handled the frame
                    stream.state = state
                stream.on_frame(received)

    def _on_other(self, received: list[Any]) -> None:
        """Handle a frame about the connection, or of a closed stream. After a GOAWAY start no more streams if
        the server drains; else close with the error that it sent."""
        kind, stream_id = received[0], received[1]
        if stream_id == 0 and kind == frame.GOAWAY:
            code, message = received[2], received[3]
            if type(code) is not str or type(message) is not str:
                raise ProtocolViolation("a malformed GOAWAY")
            error = plane_error(code, message)
            if not isinstance(error, Draining):
                self.error = error
                self.close()
                return
            self.usable = False
            self._owner.on_draining(error)
            if not self.streams:
                self.close()
            return
        was_opened = type(stream_id) is int and 0 < stream_id <= self._last_stream_id
        state = ClientStream.CLOSED if was_opened else ClientStream.UNOPENED
        if kind not in CLIENT_STEPS[state]:
            self._on_unlisted(received)

    def _on_unlisted(self, received: list[Any]) -> None:
        """Handle a frame that the state table does not list. Raises ProtocolViolation."""
        if not self._on_connection_frame(received):
            raise ProtocolViolation(f"a frame of type {received[0]!r} is not allowed here")

    def on_ping(self, token: int) -> None:
        if not self.paused:  # else the PONGs for a server that does not read would pile up
            super().on_ping(token)

    def on_pong(self, token: int) -> None:
        answered = self._pings.get(token)
        if answered is not None and not answered.done():
            answered.set_result(None)

    # ------------------------------------------------------------------- sweeps and idle time

    def on_sweep(self) -> None:
        """Ask a silent instance for a sign of life, and end requests that the worker has not accepted in
        time.

        The accept time-out runs from the sweep that finds a request's last byte sent, not while its bytes
        still leave this side.
        """
        if self._silent_sweeps >= self._ASK_AT and self._life_check is None:
            self._life_check = self._loop.create_task(self._check_life(), context=self.variables.copy())
        oldest = self.sweeps - self._accept_sweeps
        gone_bytes = self.written_bytes - self.unsent_bytes
        late: list[FrameResponseStream] = []
        for stream in self.streams.values():
            if stream.state is not ClientStream.WAITING:
                continue
            if stream.ends_at_bytes > gone_bytes:
                stream.waits_from_sweep = self.sweeps
            elif stream.waits_from_sweep < oldest:
                late.append(stream)
        if late:
            gone_bytes -= unacknowledged_bytes(self.transport)
        for stream in late:
            if stream.ends_at_bytes > gone_bytes:
                stream.waits_from_sweep = self.sweeps
                continue
            stream.fail(NotAccepted(f"the worker did not accept the request in {self._accept_timeout_s} s"))

    async def _check_life(self) -> None:
        """Ask for a sign of life once. The sweep may ask again after a keepalive interval."""
        try:
            async with asyncio.timeout(LIFE_TIMEOUT_S):
                if await self._owner.ask_for_life():
                    self.note_life()
        except (OSError, ValueError):  # TimeoutError is an OSError
            pass
        try:
            await asyncio.sleep(self._sweep_interval_s * SWEEPS_PER_INTERVAL)
        finally:
            self._life_check = None

    def on_quiet(self) -> None:
        self._owner.on_quiet(self)

    def start_sweeping(self) -> None:
        """See `Connection.start_sweeping`. The idle timer stops."""
        self._stop_idling()
        super().start_sweeping()

    def on_idle(self) -> None:
        def close_unless_probed() -> None:
            if self._pings:  # a probe waits for its answer
                self.on_idle()
            else:
                self.close()

        self._stop_idling()
        self._idle_from = self._loop.time()
        self._idle_handle = self._loop.call_later(IDLE_CLOSE_S, close_unless_probed)

    def _stop_idling(self) -> None:
        if self._idle_handle is not None:
            self._idle_handle.cancel()
            self._idle_handle = None

    def on_closed(self, error: PlaneError) -> None:
        self.usable = False
        self._unproven = None
        self._stop_idling()
        if self._life_check is not None:
            self._life_check.cancel()
        self._owner.on_closed(self)
        if not self.handshake_done.done():
            self.handshake_done.set_exception(error)
            self.handshake_done.exception()  # retrieved: there may be no waiter any more
        for answered in self._pings.values():
            if not answered.done():
                answered.set_exception(error)
        for stream in tuple(self.streams.values()):
            stream.end_without_cancel(error)
