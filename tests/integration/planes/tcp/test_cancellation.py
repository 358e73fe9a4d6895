"""A cancellation reaches the handler's context within one turn of the event loop after its frame."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.context import Context, Strength
from dynamo_redis.planes.frames.server_connection import ServerConnection
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake
from tests.fuzz.peer import Peer
from tests.fuzz.session import reset
from tests.tcp_plane import INSTANCE, SECRET


class Turns:
    """Counts the turns of the event loop."""

    def __init__(self) -> None:
        self.count = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._next)

    def _next(self) -> None:
        self.count += 1
        self._handle = self._loop.call_soon(self._next)

    def stop(self) -> None:
        self._handle.cancel()


class Watched:
    """A waiting handler, and the turns in which its context and the handler were cancelled."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.known: dict[Strength, int] = {}
        self.woken_at = 0

    async def __call__(self, _: Any, context: Context) -> str:
        context.on_cancel(self._note)
        self.started.set()
        try:
            await context.async_killed_or_stopped()
            assert context.is_stopped()
        finally:
            self.woken_at = self._turns.count
            self.ended.set()
        return "stopped"

    def _note(self, strength: Strength) -> None:
        self.known.setdefault(strength, self._turns.count)


@pytest.fixture
async def turns() -> AsyncIterator[Turns]:
    made = Turns()
    yield made
    made.stop()


@pytest.fixture
async def server() -> AsyncIterator[TcpServer]:
    made = TcpServer(PlaneSettings.load(), secret=SECRET, instance_id=INSTANCE)
    await made.start()
    yield made
    await made.aclose()


async def ask(server: TcpServer, watched: Watched, headers: dict[str, Any] | None = None) -> Peer:
    """Connect a caller with one request, whose handler has begun."""
    server.register("watched", watched)
    host, port = server.address.rsplit(":", 1)
    peer = Peer(*await asyncio.open_connection(host, int(port)))
    await peer.shake(ClientHandshake(SECRET, 10, INSTANCE))
    peer.send(pack([frame.OPEN, 1, "watched", 0, headers, None]))
    await asyncio.wait_for(watched.started.wait(), 30)
    return peer


@pytest.mark.parametrize(
    ("news", "strength"), [("stop", "stop"), ("kill", "kill"), ("FIN", "kill"), ("RST", "kill")]
)
async def test_context_knows_in_the_turn_in_which_the_news_arrives(
    server: TcpServer, turns: Turns, monkeypatch: pytest.MonkeyPatch, news: str, strength: Strength
) -> None:
    arrived: list[int] = []

    def note(name: str) -> None:
        original = getattr(ServerConnection, name)

        def noting(self: ServerConnection, *args: Any) -> Any:
            arrived.append(turns.count)
            return original(self, *args)

        monkeypatch.setattr(ServerConnection, name, noting)

    for name in ("buffer_updated", "eof_received", "connection_lost"):
        note(name)
    watched = Watched(turns)
    peer = await ask(server, watched)
    arrived.clear()
    if news == "stop":
        peer.send(pack([frame.CANCEL, 1, 1]))
    elif news == "kill":
        peer.send(pack([frame.CANCEL, 1, 2]))
    elif news == "FIN":
        peer.writer.write_eof()
    else:
        reset(peer.writer)
    await asyncio.wait_for(watched.ended.wait(), 30)
    assert watched.known[strength] - arrived[0] <= 1
    assert watched.woken_at - arrived[0] <= 2, "and the handler's own code runs in the next"
    await peer.close()


async def test_context_knows_in_the_turn_after_its_deadline(server: TcpServer, turns: Turns) -> None:
    watched = Watched(turns)
    peer = await ask(server, watched, {"deadline_ms": 50})
    time.sleep(0.1)  # the deadline passes while the event loop is busy with something else
    passed_at = turns.count
    await asyncio.wait_for(watched.ended.wait(), 30)
    assert watched.known["kill"] - passed_at <= 1
    assert watched.woken_at - passed_at <= 2
    assert (await peer.receive() or [])[:3] == [frame.ERROR, 1, "deadline_exceeded"]
    await peer.close()
