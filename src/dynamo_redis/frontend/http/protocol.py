"""uvicorn's HTTP protocol, with bounds on sent and unread bytes, and with rules of HTTP that uvicorn lacks.

Source: RFC 9110 (sections 7.8 "Upgrade", 9.3.6 "CONNECT", 10.1.1 "Expect", 15.2.1 "100 Continue") and
RFC 9112 (sections 3.2 "Request Target", 6.1 "Transfer-Encoding", 9.6 "Tear-down").
"""

from __future__ import annotations

import asyncio
import contextvars
import fcntl
import termios
from contextlib import suppress
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from dynamo_redis.frontend.http.errors import ApiError, connections_full
from dynamo_redis.frontend.http.framing import Application, framed, head_fault, sign_of_life
from dynamo_redis.frontend.http.limits import MOST_UNPARSED_BYTES, Flow, HttpLimits

HEAD_LIMIT_BYTES = 64 * 1024
"""Largest head of a request: its first line and headers. Also the most bytes between two pieces of its body,
and after the last: sizes and extensions of chunks, and trailers, which are ignored."""

FRAMING_FACTOR = 4
"""Most bytes of framing for each byte of a chunked body, in addition to `HEAD_LIMIT_BYTES` in all."""

HEAD_TIMEOUT_S = 30.0
"""Longest time from a connection, or the first byte of a further request, to the end of the head."""

PIECE_BYTES = 2048
"""Bytes parsed in one call. A request may have 18 bytes, and takes a hundred times that when parsed."""

TURN_BYTES = 32 * 1024
"""Bytes of one connection that are parsed in one turn of the event loop."""

FIRST_PROBE_S = 0.05
LONGEST_PROBE_S = 5.0
"""First and longest pause between probes of a client that sends nothing more; each is twice the last."""

DRAIN_IDLE_S = 2
"""Seconds that a connection has for its next request once the server drains. Clients cannot know that their
connection is about to be closed, and a request that crosses the close is lost. With the answer to this next
request they are told."""

DRAIN_SEND_S = 5.0
"""Longest time, once the server drains, that a client may read nothing of its response."""

_FRAMING_HEADERS = (b"content-length", b"transfer-encoding")


class HttpProtocol(HttpToolsProtocol):
    """One connection. It is closed if a request is too slow, or its head or framing too large.

    The client then gets an error in OpenAI's form. A connection whose client does not read its response is
    dropped. Sizes are checked with each piece, so a head may exceed its limit by one piece. Pipelined bytes
    are not parsed before the requests in front of them are answered.

    A request for another protocol (`Upgrade`) is served in HTTP/1.1, with its body. A client that half-closes
    its connection has sent everything, and gets the responses to its whole requests. A client that has hung
    up looks the same at first. To tell them apart, bytes that a client ignores are sent (`sign_of_life`): the
    host of a client that is gone answers them with a reset.
    """

    def __init__(self, *args: Any, limits: HttpLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._in_head = True
        self._in_body = False
        self._head_bytes = 0
        self._framing_bytes = 0
        self._barren_bytes = 0
        self._body_bytes = 0
        self._begun_at = 0.0
        self._receive_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._takes_body_only = False
        self._ended = False
        self._unparsed = bytearray()
        self._is_to_parse = False
        self._has_sent_all = False
        self._delayed_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first request's head."""
        super().connection_made(transport)
        self.flow = Flow(transport, self._unparsed)
        self._limits.waiting[self] = None
        self._start_receive_timer(HEAD_TIMEOUT_S)
        if self._limits.is_draining:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._limits.waiting.pop(self, None)
        self._stop_receive_timer()
        self._stop_send_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        super().connection_lost(exc)  # tells the newest request, which may wait behind the one that is served
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, or keep them until they may be parsed."""
        if len(data) <= PIECE_BYTES and not self._unparsed and self._may_parse():
            self._parse(data)
            return
        waits = bool(self._unparsed)
        self._unparsed += data
        if not waits:
            self._parse_on()
        if len(self._unparsed) > MOST_UNPARSED_BYTES:
            self.flow.pause_reading()

    def _may_parse(self) -> bool:
        return not (self.pipeline or self._is_over())

    def _is_over(self) -> bool:
        """Return whether bytes that come now belong to no request that will be answered."""
        return self._ended or self.transport.is_closing()

    def _parse_on(self) -> None:
        """Parse received bytes for one turn of the loop, or up to a request that has to wait."""
        unparsed, size = self._unparsed, 0
        self._is_to_parse = False
        if self._delayed_since is not None and self._may_parse():
            self._begun_at += self.loop.time() - self._delayed_since
            self._delayed_since = None
            if self._in_head:
                self._start_receive_timer(HEAD_TIMEOUT_S)
        while unparsed and size < TURN_BYTES and self._may_parse():
            piece = bytes(unparsed[:PIECE_BYTES])
            del unparsed[:PIECE_BYTES]
            size += len(piece)
            self._parse(piece)
        if self._is_over():
            unparsed.clear()
        elif unparsed and self.pipeline:
            # The rest of the request has arrived and has to wait: this time does not count against it.
            self._stop_receive_timer()
            if self._delayed_since is None:
                self._delayed_since = self.loop.time()
        elif unparsed:
            self._parse_soon()
        else:
            self.flow.resume_reading()
            if self._has_sent_all:
                self._finish_after_eof()

    def _parse_soon(self) -> None:
        if not self._is_to_parse:
            self._is_to_parse = True
            self.loop.call_soon(self._parse_on)

    def _parse(self, data: bytes) -> None:
        size, body_bytes = len(data), self._body_bytes
        if self._in_body:
            self._framing_bytes += size
        while data and not self._is_over():
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as declined:
                data = self._decline_upgrade(data[declined.args[0] :])
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            else:
                break
        if self._in_head and self._receive_timer is not None:
            self._head_bytes += size
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self._refuse(431, f"The request's headers are over {HEAD_LIMIT_BYTES} bytes.")
        elif self._in_body:
            self._barren_bytes = 0 if self._body_bytes > body_bytes else self._barren_bytes + size
            if self._receive_timer is None:
                left_s = self._begun_at + self._limits.receive_timeout_s - self.loop.time()
                self._start_receive_timer(max(0.0, left_s))
            most_bytes = HEAD_LIMIT_BYTES + FRAMING_FACTOR * self._body_bytes
            if self._barren_bytes > HEAD_LIMIT_BYTES or self._framing_bytes > most_bytes:
                self._refuse(
                    431, f"The request's chunks and trailers have over {HEAD_LIMIT_BYTES} bytes of framing."
                )

    def on_message_begin(self) -> None:
        """Begin a request: its first byte was parsed."""
        if self._takes_body_only:
            return
        self._unset_keepalive_if_required()  # only now: empty lines alone are no request
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._begun_at = self.loop.time()
        self._start_receive_timer(min(HEAD_TIMEOUT_S, self._limits.receive_timeout_s))

    def on_headers_complete(self) -> None:
        """Check a whole head, and begin the body."""
        if self._takes_body_only:
            self._takes_body_only = False
            return
        if self._is_over():
            return
        self._in_head = False
        self._in_body = True
        self._framing_bytes = self._barren_bytes = self._body_bytes = 0
        self._stop_receive_timer()
        if fault := head_fault(self.parser.get_method(), self.parser.get_http_version(), self.headers):
            self._refuse(*fault)
            return
        super().on_headers_complete()
        if self._limits.is_draining:
            self.cycle.keep_alive = False

    def on_url(self, url: bytes) -> None:
        """Add a part of a request's first line."""
        if not self._takes_body_only:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add one header. Trailers, which come after the body, are ignored."""
        if self._in_head and not self._takes_body_only:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Add a part of a request's body."""
        self._body_bytes += len(body)
        self._framing_bytes -= len(body)
        if not self._is_over():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request, unless the parser left its body to another protocol."""
        if self._is_over() or (self.parser.should_upgrade() and self._framing()):
            return
        self._in_body = False
        self._stop_receive_timer()
        self._limits.waiting.pop(self, None)
        super().on_message_complete()

    def _framing(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that define the end of the present request's body; none if it has no body."""
        return [(name, value) for name, value in self.headers if name in _FRAMING_HEADERS]

    def _decline_upgrade(self, rest: bytes) -> bytes:
        """Make a new parser for HTTP/1.1 after a head that asked for another protocol. Return its input.

        The old parser takes all following bytes for the other protocol, and has no option to change that.
        The new one first gets a head with the same framing and without `Upgrade`, which is not reported.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        framing = self._framing()
        if not framing:
            return rest
        self._takes_body_only = True
        lines = b"".join(b"%s: %s\r\n" % header for header in framing)
        return b"POST / HTTP/1.1\r\n" + lines + b"\r\n" + rest

    # ----------------------------------------------------------------- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Application) -> None:  # type: ignore[override]
        self._running = cycle
        # Without the context variables of now: a pipelined request begins in the task of the one before.
        contextvars.Context().run(super()._start_asgi_task, cycle, framed(app, cycle))  # type: ignore[arg-type]

    def on_response_complete(self) -> None:
        """After the end of a response, wait for the next request, or for the client to read the rest."""
        super().on_response_complete()
        if self._unparsed:
            self._parse_soon()
        if self.transport.is_closing():
            self._watch_sending()
        elif not self._owes_answers():
            self._limits.waiting.pop(self, None)
            self._limits.waiting[self] = None

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that has been idle for long, unless a request has arrived in this moment."""
        if not self.transport.is_closing() and self._has_unread_bytes():
            self._start_keep_alive_timer()
            return
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def _start_keep_alive_timer(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _has_unread_bytes(self) -> bool:
        """Return whether the kernel has bytes that the event loop, busy with other work, has not read yet."""
        unread = bytearray(4)
        with suppress(OSError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, unread)
        return any(unread)

    def shutdown(self) -> None:
        """Begin to drain: end with the next answer, or after `DRAIN_IDLE_S` without a request.

        A response whose head was sent did not tell the client that the connection ends. So it stays open for
        one more request.
        """
        self.timeout_keep_alive = DRAIN_IDLE_S
        self._watch_sending()
        if self._running is not None and not self.cycle.response_complete:
            if not self.cycle.response_started:
                self.cycle.keep_alive = False
        elif not (self._in_head and self._head_bytes) and not self._in_body:
            self._start_keep_alive_timer()

    def evict(self) -> None:
        """Close the connection in favour of a new one."""
        if self._in_body or (self._in_head and self._head_bytes):
            self._refuse_by(connections_full().with_overload_as(self._limits.overload_status))
        self.transport.close()
        self._watch_sending()

    # ----------------------------------------------------------------- clients that do not read

    def pause_writing(self) -> None:
        """Stop writing for now, and watch the client, which reads less than is written."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """Continue writing: the client has read most of it."""
        self._stop_send_timer()
        super().resume_writing()

    def _watch_sending(self) -> None:
        """Drop the connection if the client reads nothing of the unsent bytes for too long."""
        self._stop_send_timer()
        left_bytes = self.transport.get_write_buffer_size()
        if not left_bytes:
            return

        def check() -> None:
            if self.transport.get_write_buffer_size() >= left_bytes:
                self.transport.abort()
            else:
                self._watch_sending()

        limit_s = self._limits.send_timeout_s
        self._send_timer = self.loop.call_later(
            min(limit_s, DRAIN_SEND_S) if self._limits.is_draining else limit_s, check
        )

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    # ----------------------------------------------------------------- clients that send nothing more

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while whole requests are unanswered: the client sends nothing more."""
        self._has_sent_all = True
        if not self._unparsed:
            self._finish_after_eof()
        return not self.transport.is_closing()

    def _finish_after_eof(self) -> None:
        """Answer the whole requests that have arrived, and close."""
        if not self._owes_answers():
            self.transport.close()
            return
        self._stop_receive_timer()
        self._end_after_answers()
        if self._probe_timer is None:
            self._probe_timer = self.loop.call_later(FIRST_PROBE_S, self._probe, FIRST_PROBE_S)

    def _owes_answers(self) -> bool:
        running = self._running
        return running is not None and not running.response_complete and not running.more_body

    def _end_after_answers(self) -> None:
        """Close the connection after the response to the last whole request."""
        assert self._running is not None
        if self._ended:
            return
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()  # the newest request, which will never be whole
        last = self.pipeline[0][0] if self.pipeline else self._running
        last.keep_alive = False
        self._ended = True

    def _probe(self, pause_s: float) -> None:
        if self._running is not None and not self.transport.is_closing():
            self.transport.write(sign_of_life(self._running))
            pause_s = min(2 * pause_s, LONGEST_PROBE_S)
            self._probe_timer = self.loop.call_later(pause_s, self._probe, pause_s)

    # ----------------------------------------------------------------- refusals

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP: answer 400 and close."""
        self._refuse(400, msg)

    def _start_receive_timer(self, limit_s: float) -> None:
        def refuse() -> None:
            if self._in_body:
                self._refuse(408, f"No whole request within {self._limits.receive_timeout_s:g} s.")
            else:
                self._refuse(408, f"No whole request head within {HEAD_TIMEOUT_S:g} s.")

        self._stop_receive_timer()
        self._receive_timer = self.loop.call_later(limit_s, refuse)

    def _stop_receive_timer(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _refuse(self, status: int, message: str) -> None:
        self._refuse_by(ApiError(status, message))

    def _refuse_by(self, error: ApiError) -> None:
        self._stop_receive_timer()
        if self.transport.is_closing():
            return
        if self._owes_answers():  # the client would take a refusal for the answer to an earlier request
            self._end_after_answers()
            self.flow.pause_reading()
            return
        running = self._running
        if running is not None and running.response_started and running.more_body:
            self.transport.close()  # during or after the response to a request that is not whole
            self._watch_sending()
            return
        body = error.body_bytes()
        lines = b"".join(b"%s: %s\r\n" % header for header in error.headers())
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + lines + b"\r\n" + body)
        self.transport.close()
        self._watch_sending()
