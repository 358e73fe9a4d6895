"""hypercorn and httpx over HTTP/2 in the clear; a stream is an answer, a line an item."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
from hypercorn.asyncio import serve as serve_hypercorn
from hypercorn.config import Config

from benchmarks.request.rivals.peer import STREAMS, Announce, Peer
from benchmarks.request.workloads import KINDS, Kind

TIMEOUT_S = 60.0
MAX_STREAMS = 1000


async def _application(scope: Any, receive: Any, send: Any) -> None:
    kind = scope["path"].removeprefix("/")
    body, is_more = b"", True
    while is_more:
        message = await receive()
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if kind in STREAMS:
        async for item in STREAMS[kind](int(body)):
            await send({"type": "http.response.body", "body": item + b"\n", "more_body": True})
        body = b""
    await send({"type": "http.response.body", "body": body})


async def serve(announce: Announce) -> None:
    """Serve the kinds as paths, without an access log and with room for all requests of the suite."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.accesslog = config.errorlog = None
    config.h2_max_concurrent_streams = MAX_STREAMS
    # By default a connection is closed after 1,000 requests, with those under way.
    config.keep_alive_max_requests = 1 << 40
    ready = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            ready.set()
            await asyncio.Event().wait()
        await _application(scope, receive, send)

    serving = asyncio.ensure_future(serve_hypercorn(application, config))
    await ready.wait()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            await asyncio.sleep(0.02)
    announce(f"http://127.0.0.1:{port}")
    await serving


class HttpxPeer(Peer):
    """One client with one connection."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(
            http1=False, http2=True, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)
        )
        self._urls = {kind: f"{url}/{kind}" for kind in KINDS}

    async def echo(self, payload: bytes) -> Any:
        return (await self._client.post(self._urls["echo"], content=payload)).content

    async def stream(self, kind: Kind, count: int) -> int:
        seen = 0
        async with self._client.stream("POST", self._urls[kind], content=b"%d" % count) as response:
            async for part in response.aiter_raw():
                seen += part.count(b"\n")
        return seen


async def connect(url: str) -> HttpxPeer:
    """Make the client; the first request connects."""
    return HttpxPeer(url)
