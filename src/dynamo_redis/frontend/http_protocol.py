"""uvicorn's HTTP protocol, with bounds on a request's head and rules of HTTP that it does not have itself.

Source: RFC 9110 (sections 7.8 "Upgrade", 9.3.6 "CONNECT", 10.1.1 "Expect", 15.2.1 "100 Continue") and
RFC 9112 (sections 6.1 "Transfer-Encoding", 9.6 "Tear-down").
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from dynamo_redis.frontend.framing import Application, framed, sign_of_life
from dynamo_redis.frontend.http_errors import ApiError

HEAD_LIMIT_BYTES = 64 * 1024
"""Largest head of a request: its first line and headers."""

HEAD_TIMEOUT_S = 30.0
"""Longest time from a connection, or the first byte of a further request, to the end of the head."""


FIRST_PROBE_S = 0.05
LONGEST_PROBE_S = 5.0
"""Pauses between looks whether a client that sends nothing more still listens: each is twice the last."""

_FRAMING_HEADERS = (b"content-length", b"transfer-encoding")


class HttpProtocol(HttpToolsProtocol):
    """Ends connections whose request's head is too large or too slow, and says why in OpenAI's form.

    The limit is checked with each read, so a head may be over it by one read.

    A request for another protocol (`Upgrade`) is served in this one, with its body. A client that has sent
    everything, and says so (a half-closed connection), gets the answers to its whole requests. One that has
    hung up looks the same at first. It is told from the other by what a client skips (`sign_of_life`): the
    host of one that is gone answers that with a reset.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._takes_body_only = False
        self._ended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_head_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._unset_keepalive_if_required()
        while data and not self._ended and not self.transport.is_closing():
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as declined:
                data = self._without_upgrade(data[declined.args[0] :])
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            else:
                break
        if self._in_head and self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self._refuse(431, f"The request's headers are over {HEAD_LIMIT_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """The first byte of a request was parsed."""
        if self._takes_body_only:
            return
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._start_head_timer()

    def on_headers_complete(self) -> None:
        """A request's head is whole."""
        if self._takes_body_only:
            self._takes_body_only = False
            return
        self._in_head = False
        self._stop_head_timer()
        if self.parser.get_method() == b"CONNECT":
            self._refuse(405, "This server is no proxy.")
            return
        super().on_headers_complete()

    def on_url(self, url: bytes) -> None:
        """Take part of a request's first line."""
        if not self._takes_body_only:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one line of a request's head."""
        if not self._takes_body_only:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Take part of a request's body."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Take a request for whole, unless its parser left the body to another protocol."""
        if self.transport.is_closing() or (self.parser.should_upgrade() and self._framing()):
            return
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

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection while whole requests are to be answered: the client sends nothing more."""
        if not self._owes_answers():
            return False
        self._stop_head_timer()
        self._end_after_answers()
        if self._probe_timer is None:
            self._probe_after(FIRST_PROBE_S)
        return True

    def _owes_answers(self) -> bool:
        running = self._running
        return running is not None and not running.response_complete and not running.more_body

    def _end_after_answers(self) -> None:
        """Let the last whole request be the connection's last."""
        assert self._running is not None
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

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        self._refuse(408, f"No whole request head within {HEAD_TIMEOUT_S:g} s.")

    def _refuse(self, status: int, message: str) -> None:
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        if self._owes_answers():  # to what came before; a refusal would be taken for one of them
            self._end_after_answers()
            self.flow.pause_reading()
            return
        running = self._running
        if running is not None and running.response_started and not running.response_complete:
            self.transport.close()  # amid the answer to a request that is not whole
            return
        body = ApiError(status, message).body_bytes()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(
            body
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
