"""Our side: the tcp plane through its contract, with the settings' defaults and with a secret."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.request.rivals.peer import STREAMS, Announce, Peer, WrongAnswer
from benchmarks.request.workloads import KINDS, Kind
from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import Handler, RequestPlaneClient, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server

INSTANCE = 1
SECRET = b"the secret of a benchmark's life"


def target(address: str, kind: Kind) -> Target:
    """Return one of the endpoints of `serve` as a target."""
    return Target(INSTANCE, address, kind, SECRET)


async def _echo(request: Any, _: Context) -> Any:
    return request


def _streaming(kind: Kind) -> Handler:
    items = STREAMS[kind]

    def handler(request: int, _: Context) -> AsyncIterator[bytes]:
        return items(request)

    return handler


async def serve(announce: Announce, host: str = "127.0.0.1") -> None:
    """Serve the three kinds, each as an endpoint."""
    server = make_server(PlaneSettings.load(tcp_host=host), secret=SECRET, instance_id=INSTANCE)
    for kind in KINDS:
        server.register(kind, _echo if kind == "echo" else _streaming(kind))
    await server.start()
    try:
        announce(server.address)
        await asyncio.Event().wait()
    finally:
        await server.aclose()


class PlanePeer(Peer):
    """Calls one server through a client of the plane."""

    def __init__(self, client: RequestPlaneClient, address: str) -> None:
        self._client = client
        self._targets = {kind: target(address, kind) for kind in KINDS}

    async def echo(self, payload: bytes) -> Any:
        answers = self._client.open(self._targets["echo"], payload, None)
        answer = await anext(answers)
        if not answers.is_over:
            raise WrongAnswer("an echo is one item")
        return answer

    async def stream(self, kind: Kind, count: int) -> int:
        seen = 0
        async for _ in self._client.open(self._targets[kind], count, None):
            seen += 1
        return seen

    async def aclose(self) -> None:
        await self._client.aclose()


async def connect(address: str) -> PlanePeer:
    """Make the client; the first request connects."""
    return PlanePeer(make_client(PlaneSettings.load()), address)
