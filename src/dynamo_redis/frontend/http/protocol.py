"""uvicorn's HTTP protocol, with bounds on what clients send and do not read, and rules of HTTP that it does
not have itself.

Source: RFC 9110 (sections 7.8 "Upgrade", 9.3.6 "CONNECT", 10.1.1 "Expect", 15.2.1 "100 Continue") and
RFC 9112 (sections 3.2 "Request Target", 6.1 "Transfer-Encoding", 9.6 "Tear-down").
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.http.framing import Application, framed, head_fault, sign_of_life
from dynamo_redis.frontend.http.limits import MOST_UNPARSED_BYTES, Flow, HttpLimits

HEAD_LIMIT_BYTES = 64 * 1024
"""Largest head of a request: its first line and headers. Also the most that may come between two pieces of
its body, and behind the last: sizes and extensions of chunks, and trailers, which are left out."""

FRAMING_FACTOR = 4
"""Chunks may take so many bytes for each byte of the body, beside `HEAD_LIMIT_BYTES` in all."""

HEAD_TIMEOUT_S = 30.0
"""Longest time from a connection, or the first byte of a further request, to the end of the head."""

PIECE_BYTES = 2048
"""So much is parsed at a time. A request may have 18 bytes, and takes a hundred times that when parsed."""

TURN_BYTES = 32 * 1024
"""So much of one connection is parsed before the event loop sees to others."""

FIRST_PROBE_S = 0.05
LONGEST_PROBE_S = 5.0
"""Pauses between looks whether a client that sends nothing more still listens: each is twice the last."""

_FRAMING_HEADERS = (b"content-length", b"transfer-encoding")


class HttpProtocol(HttpToolsProtocol):
    """Ends connections whose request is too slow, or whose head or framing is too large, and says why in
    OpenAI's form; and those whose client does not read its answer.

    Sizes are checked with each piece, so a head may be over its limit by one piece. What comes behind a
    request that waits for the answer to another is not parsed before that has its turn.

    A request for another protocol (`Upgrade`) is served in this one, with its body. A client that has sent
    everything, and says so (a half-closed connection), gets the answers to its whole requests. One that has
    hung up looks the same at first. It is told from the other by what a client skips (`sign_of_life`): the
    host of one that is gone answers that with a reset.
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
        """A client has connected."""
        super().connection_made(transport)
        self.flow = Flow(transport, self._unparsed)
        self._limits.waiting[self] = None
        self._start_receive_timer(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._limits.waiting.pop(self, None)
        self._stop_receive_timer()
        self._stop_send_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
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
        """Tell whether what comes now is of no request that will be answered."""
        return self._ended or self.transport.is_closing()

    def _parse_on(self) -> None:
        """Parse what has come, for a turn of the loop, or up to a request that has to wait."""
        unparsed, size = self._unparsed, 0
        self._is_to_parse = False
        self._end_delay()
        while unparsed and size < TURN_BYTES and self._may_parse():
            piece = bytes(unparsed[:PIECE_BYTES])
            del unparsed[:PIECE_BYTES]
            size += len(piece)
            self._parse(piece)
        if self._is_over():
            unparsed.clear()
        elif unparsed and self.pipeline:
            self._begin_delay()
        elif unparsed:
            self._parse_soon()
        else:
            self.flow.resume_reading()
            if self._has_sent_all:
                self._take_end()

    def _parse_soon(self) -> None:
        if not self._is_to_parse:
            self._is_to_parse = True
            self.loop.call_soon(self._parse_on)

    def _begin_delay(self) -> None:
        """Let no time count for a request whose rest is here and has to wait."""
        self._stop_receive_timer()
        if self._delayed_since is None:
            self._delayed_since = self.loop.time()

    def _end_delay(self) -> None:
        if self._delayed_since is not None and self._may_parse():
            self._begun_at += self.loop.time() - self._delayed_since
            self._delayed_since = None
            if self._in_head:
                self._start_receive_timer(HEAD_TIMEOUT_S)

    def _parse(self, data: bytes) -> None:
        size, body_bytes = len(data), self._body_bytes
        if self._in_body:
            self._framing_bytes += size
        while data and not self._is_over():
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as declined:
                data = self._without_upgrade(data[declined.args[0] :])
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
            self._check_body()

    def _check_body(self) -> None:
        """Bound what comes of a request beside its body, and how long it may come."""
        if self._receive_timer is None:
            left_s = self._begun_at + self._limits.receive_timeout_s - self.loop.time()
            self._start_receive_timer(max(0.0, left_s))
        most_bytes = HEAD_LIMIT_BYTES + FRAMING_FACTOR * self._body_bytes
        if self._barren_bytes > HEAD_LIMIT_BYTES or self._framing_bytes > most_bytes:
            self._refuse(
                431, f"The request's chunks and trailers have over {HEAD_LIMIT_BYTES} bytes of framing."
            )

    def on_message_begin(self) -> None:
        """The first byte of a request was parsed."""
        if self._takes_body_only:
            return
        self._unset_keepalive_if_required()  # not before: empty lines alone are no request
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._begun_at = self.loop.time()
        self._start_receive_timer(min(HEAD_TIMEOUT_S, self._limits.receive_timeout_s))

    def on_headers_complete(self) -> None:
        """A request's head is whole."""
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

    def on_url(self, url: bytes) -> None:
        """Take part of a request's first line."""
        if not self._takes_body_only:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one line of a request's head. Trailers, which come behind the body, are left out."""
        if self._in_head and not self._takes_body_only:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Take part of a request's body."""
        self._body_bytes += len(body)
        self._framing_bytes -= len(body)
        if not self._is_over():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Take a request for whole, unless its parser left the body to another protocol."""
        if self._is_over() or (self.parser.should_upgrade() and self._framing()):
            return
        self._in_body = False
        self._stop_receive_timer()
        self._limits.waiting.pop(self, None)
        super().on_message_complete()

    def _framing(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that say where the present request's body ends; none if it has no body."""
        return [(name, value) for name, value in self.headers if name in _FRAMING_HEADERS]

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Get ready to read on in HTTP/1.1, behind a head that asked for another protocol; what to read.

        A parser takes all that follows such a head for the other protocol, and cannot be told otherwise. A
        new one gets a head that has the same framing and asks for nothing; of that nothing is reported.
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
        super()._start_asgi_task(cycle, framed(app, cycle))  # type: ignore[arg-type]

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest to be taken: an answer was written to its end."""
        super().on_response_complete()
        if self._unparsed:
            self._parse_soon()
        if self.transport.is_closing():
            self._watch_sending()
        elif not self._owes_answers():
            self._limits.waiting.pop(self, None)
            self._limits.waiting[self] = None

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that has been idle for long."""
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def give_way(self) -> None:
        """Make room for another connection."""
        if self._in_body or (self._in_head and self._head_bytes):
            self._refuse(503, "Other connections need the room: send the request again, in one piece.")
        self.transport.close()
        self._watch_sending()

    # ----------------------------------------------------------------- clients that do not read

    def pause_writing(self) -> None:
        """Write no more for now, and watch the client, which takes less than is written."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """Write on: the client has taken most of it."""
        self._stop_send_timer()
        super().resume_writing()

    def _watch_sending(self) -> None:
        """Drop the connection if the client takes nothing for too long of what is left to send."""
        self._stop_send_timer()
        if left_bytes := self.transport.get_write_buffer_size():
            self._send_timer = self.loop.call_later(
                self._limits.send_timeout_s, self._on_send_timeout, left_bytes
            )

    def _on_send_timeout(self, left_bytes: int) -> None:
        if self.transport.get_write_buffer_size() >= left_bytes:
            self.transport.abort()
        else:
            self._watch_sending()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    # ----------------------------------------------------------------- clients that send nothing more

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while whole requests are to be answered: the client sends nothing more."""
        self._has_sent_all = True
        if not self._unparsed:
            self._take_end()
        return not self.transport.is_closing()

    def _take_end(self) -> None:
        """Answer the whole requests that have come, and close."""
        if not self._owes_answers():
            self.transport.close()
            return
        self._stop_receive_timer()
        self._end_after_answers()
        if self._probe_timer is None:
            self._probe_after(FIRST_PROBE_S)

    def _owes_answers(self) -> bool:
        running = self._running
        return running is not None and not running.response_complete and not running.more_body

    def _end_after_answers(self) -> None:
        """Let the last whole request be the connection's last."""
        assert self._running is not None
        if self._ended:
            return
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()  # the newest, which will never be whole
        last = self.pipeline[0][0] if self.pipeline else self._running
        last.keep_alive = False
        self._ended = True

    def _probe_after(self, pause_s: float) -> None:
        self._probe_timer = self.loop.call_later(pause_s, self._probe, pause_s)

    def _probe(self, pause_s: float) -> None:
        if self._running is not None and not self.transport.is_closing():
            self.transport.write(sign_of_life(self._running))
            self._probe_after(min(2 * pause_s, LONGEST_PROBE_S))

    # ----------------------------------------------------------------- refusals

    def send_400_response(self, msg: str) -> None:
        """What was received is not HTTP."""
        self._refuse(400, msg)

    def _start_receive_timer(self, limit_s: float) -> None:
        self._stop_receive_timer()
        self._receive_timer = self.loop.call_later(limit_s, self._on_receive_timeout)

    def _stop_receive_timer(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _on_receive_timeout(self) -> None:
        if self._in_body:
            self._refuse(408, f"No whole request within {self._limits.receive_timeout_s:g} s.")
        else:
            self._refuse(408, f"No whole request head within {HEAD_TIMEOUT_S:g} s.")

    def _refuse(self, status: int, message: str) -> None:
        self._stop_receive_timer()
        if self.transport.is_closing():
            return
        if self._owes_answers():  # to what came before; a refusal would be taken for one of them
            self._end_after_answers()
            self.flow.pause_reading()
            return
        running = self._running
        if running is not None and running.response_started and running.more_body:
            self.transport.close()  # amid the answer to a request that is not whole, or behind it
            self._watch_sending()
            return
        body = ApiError(status, message).body_bytes()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(
            body
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._watch_sending()
