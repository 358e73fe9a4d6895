"""One caller's connection at the server: the handshake, and the frames that open and steer its requests."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from dynamo_redis.errors import (
    AuthenticationFailed,
    Draining,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
)
from dynamo_redis.planes.address import format_address
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.connection import Connection
from dynamo_redis.planes.frames.server_request import (
    Admission,
    RegisteredEndpoint,
    Request,
    context_of,
    error_frame,
)
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.wire import frame
from dynamo_redis.wire.decoder import ReadBuffers, Unusable
from dynamo_redis.wire.handshake import ServerHandshake, refusal
from dynamo_redis.wire.session import KILL, OPEN_STREAMING, SERVER_STEPS, ServerStream

_ACCEPT_AFTER_S: Final = 0.5
_FAREWELL: Final = 1 << 31
"""The token of a drain's PING; the tokens of the sweeps count up from 0."""

_RECEIVING: Final = SERVER_STEPS[ServerStream.UNOPENED][OPEN_STREAMING]
_RUNNING: Final = SERVER_STEPS[ServerStream.UNOPENED][frame.OPEN]
_NO_TYPES: Final = (KILL, OPEN_STREAMING)
"""Inputs of the tables that are no frame types."""

# Log lines; the arguments are the peer's address and the error.
_OTHER_INSTANCE: Final = (
    "%s does not get in: %s; its view of the registry is old, or it reads another registry"
)
_NO_PROOF: Final = "%s does not get in: %s; callers find it in the worker's record: do both use one registry?"
_NO_HANDSHAKE: Final = "%s does not get in: %s; is it meant for this port, and its DYN_TCP_TLS the worker's?"


class ConnectionHost(Protocol):
    """The server of a connection: its admission, its log and its endpoints."""

    @property
    def admission(self) -> Admission:
        """Decides which requests run."""
        ...

    @property
    def complaints(self) -> RateLimitedLog:
        """The rate-limited log of refused callers and requests."""
        ...

    def endpoint(self, subject: str) -> RegisteredEndpoint:
        """Return the endpoint of a request. Raises EndpointNotFound or Draining."""
        ...

    def note_refused(self, subject: str, error: PlaneError) -> None:
        """Count a request that is answered with an error at once."""
        ...

    def on_made(self, connection: ServerConnection) -> None:
        """Handle a new connection, before its handshake."""
        ...

    def on_handshake_done(self, connection: ServerConnection) -> None:
        """Note that the caller is authenticated."""
        ...

    def on_closed(self, connection: ServerConnection) -> None:
        """Forget a connection that has ended."""
        ...


class ServerConnection(Connection):
    """A caller's connection, with its requests."""

    __slots__ = (
        "_accept_sweeps",
        "_admission",
        "_handshake",
        "_handshake_timeout_s",
        "_handshake_timer",
        "_has_read_all",
        "_host",
        "_last_stream_id",
    )

    def __init__(
        self,
        host: ConnectionHost,
        handshake: ServerHandshake,
        loop: asyncio.AbstractEventLoop,
        buffers: ReadBuffers,
        *,
        max_message_bytes: int,
        keepalive_interval_s: float,
        handshake_timeout_s: float,
    ) -> None:
        super().__init__(
            loop,
            buffers,
            window_count=handshake.server.window_count,
            max_message_bytes=max_message_bytes,
            keepalive_interval_s=keepalive_interval_s,
        )
        self._host = host
        self._admission = host.admission
        self._handshake: ServerHandshake | None = handshake
        self._handshake_timeout_s = handshake_timeout_s
        self._handshake_timer: asyncio.TimerHandle | None = None
        self._accept_sweeps = max(1, int(_ACCEPT_AFTER_S / self._sweep_interval_s))
        self._last_stream_id = 0
        self._has_read_all = True
        self.streams: dict[int, Request] = {}

    # ------------------------------------------------------------------- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        def give_up() -> None:
            self._handshake_timer = None
            self.on_handshake_failed(ProtocolViolation("the handshake took too long"))

        super().connection_made(transport)
        self._handshake_timer = self._loop.call_later(self._handshake_timeout_s, give_up)
        self._host.on_made(self)

    def eof_received(self) -> bool:
        handshake = self._handshake
        if handshake is not None and handshake.client is not None and not self.closed:
            # An honest caller with another secret: it has checked this side's proof first.
            error = AuthenticationFailed("it hung up instead of proving that it knows the instance's secret")
            self._host.complaints.log(_NO_PROOF, self._peer(), error)
        return super().eof_received()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()  # a caller that does not read answers can send no more requests

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.paused and not self.closed:
            self.transport.resume_reading()

    def refuse(self, error: PlaneError) -> None:
        """Send the error and close, during the handshake."""
        if self.closed:
            return
        handshake = self._handshake
        if (
            handshake is not None and handshake.client is not None
        ):  # it has this side's HELLO, and expects frames
            self.send(frame.encode_goaway(error.code, str(error)))
        else:
            self.transport.write(refusal(error))
        self.close()

    def send_farewell_ping(self) -> None:
        """Send a PING whose PONG shows that the caller has read all bytes written before.

        Only the caller knows: when the transport here has nothing left to write, megabytes may still be in
        the kernels of both sides and in proxies. If the connection were closed now, any bytes that the caller
        sends would reset it, and that data would be lost.
        """
        if self._ready and not self.closed:
            self._has_read_all = False
            self.send(frame.encode_ping(_FAREWELL))

    @property
    def has_read_all(self) -> bool:
        """True if the caller has read all bytes written before `send_farewell_ping`, or is gone."""
        return self._has_read_all or self.closed

    def on_pong(self, token: int) -> None:
        if token == _FAREWELL:
            self._has_read_all = True

    def go_away(self) -> None:
        """Tell the caller to send new requests elsewhere."""
        if self._ready and not self.closed:
            self.send(frame.encode_goaway(Draining.code, "the worker is shutting down"))

    def on_handshake_bytes(self, data: memoryview) -> memoryview:
        handshake = self._handshake
        assert handshake is not None
        answer, rest = handshake.feed(data)
        if answer:
            self.transport.write(answer)
        if handshake.asks_for_life:
            self.close()
        elif handshake.done:
            assert handshake.client is not None
            self.peer_window_count = handshake.client.window_count
            self._ready = True
            self._handshake = None
            self._cancel_handshake_timer()
            self._host.on_handshake_done(self)
        return rest

    def on_handshake_failed(self, error: PlaneError) -> None:
        handshake = self._handshake
        if not isinstance(error, AuthenticationFailed):
            complaint = _NO_HANDSHAKE
        elif handshake is not None and handshake.client is not None:  # its HELLO was accepted
            complaint = _NO_PROOF
        else:
            complaint = _OTHER_INSTANCE
        self._host.complaints.log(complaint, self._peer(), error)
        self.refuse(error)

    def _peer(self) -> str:
        name = self.transport.get_extra_info("peername")
        return format_address(*name[:2]) if name else "a caller"

    def _cancel_handshake_timer(self) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None

    def on_sweep(self) -> None:
        due = self.sweeps - self._accept_sweeps
        for request in self.streams.values():
            if not request.has_sent and request.opened_at_sweep < due:
                request.accept()

    def on_closed(self, error: PlaneError) -> None:
        self._cancel_handshake_timer()
        for request in tuple(self.streams.values()):
            request.kill()
        self._host.on_closed(self)

    # ------------------------------------------------------------------- frames

    def on_frames(self, frames: list[list[Any]]) -> None:
        for received in frames:
            if self.closed:
                return
            if received[0] == frame.OPEN or received[0] == frame.OPEN_RAW:
                self._on_open(received)
            else:
                self._on_stream_frame(received)

    def _on_open(self, received: list[Any]) -> None:
        """Admit a new request, or answer it with the error. Raises ProtocolViolation."""
        if received[0] == frame.OPEN:
            _, stream_id, subject, flags, headers, message = received
        else:
            _, stream_id, subject, flags, headers, _, message = received
        if type(stream_id) is not int or not self._last_stream_id < stream_id <= frame.MAX_STREAM_ID:
            raise ProtocolViolation("stream ids go up")
        if (
            type(subject) is not str
            or type(flags) is not int
            or not (headers is None or type(headers) is dict)
        ):
            raise ProtocolViolation("a malformed OPEN")
        self._last_stream_id = stream_id
        state = _RECEIVING if flags else _RUNNING
        try:
            endpoint = self._host.endpoint(subject)
            if type(message) is Unusable:
                raise self._refusal(message.error)
            if flags and flags != frame.FLAG_REQUEST_STREAM:  # it may change the meaning of the request
                raise InvalidRequest(f"flags {flags:#x} of the request are not known here")
            if flags and not endpoint.request_stream:
                raise InvalidRequest("the endpoint takes one message, not a stream of them")
            context = Context() if headers is None else context_of(headers)
            request = Request(self, self._admission, endpoint, stream_id, state, context, message)
            self.streams[stream_id] = request
            if received[0] == frame.OPEN:
                self._admission.admit(request)
            else:
                self._admission.admit_large(request, received[5])
            if context.deadline is not None:
                request.watch_deadline(self._loop)
        except PlaneError as exc:
            self.streams.pop(stream_id, None)
            self._host.note_refused(subject, exc)
            self.send(error_frame(stream_id, exc))
            return
        if not self.sweeping:
            self.start_sweeping()

    def _refusal(self, error: PlaneError) -> PlaneError:
        """Return the error of a payload that was not accepted, with a hint when to retry."""
        if isinstance(error, Overloaded):
            error.retry_after_s = self._admission.retry_after_s()
            self._host.complaints.log("large requests are refused: %s", error)
        return error

    def _on_stream_frame(self, received: list[Any]) -> None:
        """Handle a frame by the state table: of a request, of a closed stream, or of the connection."""
        kind, stream_id = received[0], received[1]
        request = self.streams.get(stream_id)
        if kind == frame.CANCEL:
            if received[2] == frame.Strength.KILL:
                kind = KILL
        elif kind in _NO_TYPES:
            raise _not_allowed(kind)
        if request is not None:
            state = request.state
        elif type(stream_id) is int and 0 < stream_id <= self._last_stream_id:
            state = ServerStream.CLOSED
        else:
            state = ServerStream.UNOPENED
        step = SERVER_STEPS[state].get(kind)
        if step is not None:
            if request is not None:
                request.state = step
                request.on_frame(kind, received)
        elif received[0] == frame.GOAWAY and stream_id == 0:
            self.close()
        elif not self._on_connection_frame(received):
            raise _not_allowed(received[0])


def _not_allowed(kind: object) -> ProtocolViolation:
    return ProtocolViolation(f"a frame of type {kind!r} is not allowed here")
