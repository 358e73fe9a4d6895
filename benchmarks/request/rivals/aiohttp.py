"""aiohttp: POST over kept connections; a stream is a chunked answer, a line an item."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import ClientSession, TCPConnector, web

from benchmarks.request.rivals.peer import STREAMS, Announce, Peer
from benchmarks.request.workloads import KINDS, Kind


async def _echo(request: Any) -> Any:
    return web.Response(body=await request.read())


def _streaming(kind: Kind) -> Any:
    items = STREAMS[kind]

    async def handler(request: Any) -> Any:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        count = int(await request.read())
        await response.prepare(request)
        async for item in items(count):
            await response.write(item + b"\n")
        await response.write_eof()
        return response

    return handler


async def serve(announce: Announce) -> None:
    """Serve the kinds as paths, without an access log."""
    application = web.Application(client_max_size=1 << 30)
    for kind in KINDS:
        application.router.add_post(f"/{kind}", _echo if kind == "echo" else _streaming(kind))
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    announce(f"http://{host}:{port}")
    await asyncio.Event().wait()


class AiohttpPeer(Peer):
    """One session, with as many connections as there are requests at once."""

    def __init__(self, url: str) -> None:
        self._session = ClientSession(connector=TCPConnector(limit=0))
        self._urls = {kind: f"{url}/{kind}" for kind in KINDS}

    async def echo(self, payload: bytes) -> Any:
        async with self._session.post(self._urls["echo"], data=payload) as response:
            return await response.read()

    async def stream(self, kind: Kind, count: int) -> int:
        seen = 0
        async with self._session.post(self._urls[kind], data=b"%d" % count) as response:
            async for _ in response.content:
                seen += 1
        return seen


async def connect(url: str) -> AiohttpPeer:
    """Make the session; the first request connects."""
    return AiohttpPeer(url)
