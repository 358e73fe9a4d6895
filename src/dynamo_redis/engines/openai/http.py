"""HTTP to an engine's server: streamed completions and short requests.

The only importer of aiohttp (`pip install dynamo-redis[engines]`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp.connector import AddrInfoType
from pydantic_core import to_json

from dynamo_redis.engines.openai.wire import DONE, SseReader, refusal
from dynamo_redis.errors import (
    CannotConnect,
    ConnectionLost,
    Draining,
    PlaneError,
    ProtocolViolation,
    RequestCancelled,
)

_PIECE_BYTES: Final = 64 << 10
_ERROR_BYTES: Final = 64 << 10
_ANSWER_BYTES: Final = 16 << 20
_ERROR_S: Final = 5.0
_END_S: Final = 0.1

_IDLE_CONNECTION_S: Final = 2.0
"""Shorter than the 5 s after which uvicorn, which most engines run on, closes an idle connection."""

_JSON: Final = {"Content-Type": "application/json"}

_KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""Seconds, seconds, probes: a connection to a host that is gone fails within 11 s."""


class EngineHttp:
    """Connections to one server, one for each request at a time. Belongs to one event loop."""

    def __init__(self, url: str, api_key: str | None, connect_timeout_s: float) -> None:
        """Take the server's root URL, with or without `/v1`. Raises ValueError if it is not an HTTP URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            shown = url.rpartition("@")[2]  # without a user and password
            raise ValueError(f"{shown!r} is not an HTTP address: write for example http://127.0.0.1:8001")
        self._root = url.rstrip("/").removesuffix("/v1")
        self.url = self._root.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1)
        """The URL for messages, without a user and password."""
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def _opened(self) -> aiohttp.ClientSession:
        """Return the session; open it at the first call."""
        if self._session is not None:
            return self._session

        def open_socket(address: AddrInfoType) -> socket.socket:
            # Keepalive probes fail if the engine's host is gone: an answer has no time limit.
            family, kind, protocol, *_ = address
            opened = socket.socket(family, kind, protocol)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return opened

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_IDLE_CONNECTION_S, socket_factory=open_socket
            ),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            raise_for_status=False,
            trust_env=False,
        )
        return self._session

    async def ask(self, method: str, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Send a short request; return the status and the whole content, of at most 16 MiB.

        Raises CannotConnect if no process listens there, ConnectionLost if the answer is not complete in
        time, ProtocolViolation if it is longer.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._opened().request(method, self._root + path, timeout=timeout) as response:
                content = await _content(response, _ANSWER_BYTES)
                if len(content) > _ANSWER_BYTES:
                    raise ProtocolViolation(f"the engine's {path} has more than {_ANSWER_BYTES} bytes")
                return response.status, content
        except TimeoutError as exc:
            raise ConnectionLost(f"no answer within {timeout_s:g} s") from exc
        except aiohttp.ClientConnectorError as exc:
            raise CannotConnect(str(exc)) from exc
        except aiohttp.ClientError as exc:
            raise ConnectionLost(f"no answer: {exc!r}") from exc

    def complete(
        self,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        chat: Mapping[str, bytes] | None = None,
    ) -> Completion:
        """Start a streamed completion, of a chat if there are fields of one, each as JSON."""
        path = "completions" if chat is None else "chat/completions"
        return Completion(self._opened(), f"{self._root}/v1/{path}", body, headers, chat or {})

    def embed(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Completion:
        """Start a request for embeddings."""
        return Completion(self._opened(), f"{self._root}/v1/embeddings", body, headers, {})

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None


class Completion:
    """One streamed completion. It has to be closed in any case.

    `close` ends it at once, in any state, and closes its connection to the server.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        written: Mapping[str, bytes],
    ) -> None:
        """Post the body, with further fields that are `written` as JSON."""

        async def post() -> aiohttp.ClientResponse:
            content = to_json(body)  # in half the time of aiohttp's own way
            if written:
                fields = [b",%b:%b" % (to_json(name), value) for name, value in written.items()]
                content = b"".join((content[:-1], *fields, b"}"))
            # aiohttp writes a BytesIO in pieces, and lets other requests run between them.
            data = content if len(content) <= _PIECE_BYTES else io.BytesIO(content)
            return await session.post(url, data=data, headers={**headers, **_JSON})

        self._opening = asyncio.ensure_future(post())
        self._closed: PlaneError | None = None

    def close(self, reason: PlaneError | None = None) -> None:
        """End the completion.

        Idempotent. If `events` still waits, it raises `reason`, or RequestCancelled.
        """
        self._closed = self._closed or reason or RequestCancelled("the request was cancelled")
        if not self._opening.cancel() and not self._opening.cancelled() and not self._opening.exception():
            self._opening.result().close()

    async def content(self) -> bytes:
        """Return the content of an answer that is not streamed. Raises as `events`."""
        async with contextlib.aclosing(self.events()) as arriving:
            return b"".join([event async for events in arriving for event in events if event != DONE])

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """Yield the data of the completion's events, in the pieces in which they arrive; `DONE` is the last.

        Raises Draining if the server does not answer, the error of its HTTP status, ConnectionLost if the
        answer breaks off, or the reason of `close`.
        """
        reader = SseReader()
        try:
            response = await self._opening
            if response.status != 200:
                explanation = b""
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with asyncio.timeout(_ERROR_S):
                        explanation = await _content(response, _ERROR_BYTES)
                raise refusal(response.status, explanation, response.headers.get("Retry-After"))
            if response.content_type == "application/json":  # a server that does not stream
                content = await _content(response, _ANSWER_BYTES)
                if len(content) > _ANSWER_BYTES:
                    raise ProtocolViolation(f"the engine's answer has more than {_ANSWER_BYTES} bytes")
                yield [content, DONE]
                return
            while content := await response.content.readany():
                events = list(reader.feed(content))
                if DONE not in events:
                    yield events
                    continue
                yield events[: events.index(DONE)]
                await _read_to_end(response)
                yield [DONE]
                return
            yield list(reader.feed(b"\n"))  # a last line that the server did not end
        except asyncio.CancelledError:
            if self._closed is not None and self._opening.cancelled():
                raise self._closed from None
            raise
        except aiohttp.ClientConnectorError as exc:
            raise Draining(f"the engine does not answer: {exc}") from exc
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as exc:
            if self._closed is not None:
                raise self._closed from exc
            raise ConnectionLost(f"the connection to the engine broke: {exc!r}") from exc


async def _content(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Read the content to its end, or until it is over the limit. Raises aiohttp's error if it is cut off."""
    pieces: list[bytes] = []
    size_bytes = 0
    while size_bytes <= limit_bytes and (piece := await response.content.readany()):
        pieces.append(piece)
        size_bytes += len(piece)
    return b"".join(pieces)


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    """Read the rest of a response after its last event, so that the connection can be used again.

    An error here is ignored: the answer is complete.
    """
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_END_S):
            while not response.content.at_eof():
                await response.content.readany()
