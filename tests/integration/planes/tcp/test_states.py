"""Every frame in every state of a connection, on both sides, has the effect that the table lists.

`tests/integration/planes/tcp/test_plane.py` has the same for the states of a stream.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, Final

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from dynamo_redis.wire.session import KILL, OPEN_STREAMING
from tests.fuzz.peer import Heard, Peer
from tests.fuzz.session import soon
from tests.tcp_plane import INSTANCE, SECRET

DOCUMENT: Final = (Path(__file__).parents[4] / "docs" / "wire-protocol.md").read_text()
WINDOW: Final = 10


class State(Enum):
    """The state of a connection at the side that receives a frame."""

    NEW = "nothing was heard yet"
    HANDSHAKE = "HELLOs were exchanged; the client's proof is missing"
    OPEN = "the handshake is done"
    DRAINING = "the server has sent GOAWAY draining, and a request is under way"
    CLOSING = "GOAWAY with another code was sent or received"


class Outcome(Enum):
    """The effect of a frame on the connection."""

    GOES_ON = "the connection answers a PING"
    REFUSED = "a REFUSAL, and the end"
    VIOLATION = "GOAWAY protocol_violation, and the end"
    ENDS = "the end, without a frame"


FRAMES: Final[dict[str, list[Any] | bytes]] = {
    "OPEN": [frame.OPEN, 2, "hang", 0, None, None],
    "OPEN with a request stream": [frame.OPEN, 2, "total", 1, None, None],
    "OPEN_RAW": [frame.OPEN_RAW, 2, "hang", 0, None, 1, 1],
    "DATA": [frame.DATA, 1, "x"],
    "BATCH": [frame.BATCH, 1, ["x", "y"]],
    "END": [frame.END, 1],
    "LAST": [frame.LAST, 1, "x"],
    "LAST_BATCH": [frame.LAST_BATCH, 1, ["x", "y"]],
    "ERROR": [frame.ERROR, 1, "overloaded", "full", None],
    "ACCEPT": [frame.ACCEPT, 1],
    "CREDIT": [frame.CREDIT, 1, 5],
    "CANCEL stop": [frame.CANCEL, 1, 1],
    "CANCEL kill": [frame.CANCEL, 1, 2],
    "DATA_RAW": [frame.DATA_RAW, 1, 1, 1],
    "LAST_RAW": [frame.LAST_RAW, 1, 1, 1],
    "PING": [frame.PING, 0, 5],
    "PONG": [frame.PONG, 0, 5],
    "PING of a stream": [frame.PING, 1, 5],
    "PONG of a stream": [frame.PONG, 1, 5],
    "GOAWAY draining": [frame.GOAWAY, 0, "draining", "bye"],
    "GOAWAY overloaded": [frame.GOAWAY, 0, "overloaded", "bye"],
    "GOAWAY authentication_failed": [frame.GOAWAY, 0, "authentication_failed", "bye"],
    "GOAWAY protocol_violation": [frame.GOAWAY, 0, "protocol_violation", "bye"],
    "GOAWAY of a later release": [frame.GOAWAY, 0, "of_a_later_release", "bye"],
    "GOAWAY of a stream": [frame.GOAWAY, 1, "draining", "bye"],
    "a short GOAWAY": [frame.GOAWAY, 0, "draining"],
    "a type of a later release": [17, 0, None],
    "an optional type of a later release": [64, 0, None, "more"],
    "a table's name for a kill": [KILL, 1],
    "a table's name for a request stream": [OPEN_STREAMING, 0],
    "no type at all": [None, 0],
    "no frame at all": b"\xc1",
}

FROM_CALLERS: Final = {"OPEN", "OPEN with a request stream", "OPEN_RAW", "CANCEL stop", "CANCEL kill"}
FROM_WORKERS: Final = {
    "ERROR",
    "ACCEPT",
    "DATA",
    "BATCH",
    "END",
    "LAST",
    "LAST_BATCH",
    "DATA_RAW",
    "LAST_RAW",
}
FROM_BOTH: Final = {"CREDIT", "PING", "PONG", "an optional type of a later release"}
FAREWELLS: Final = {name for name in FRAMES if name.startswith("GOAWAY") and "stream" not in name}


RAW_TYPES: Final = (frame.OPEN_RAW, frame.DATA_RAW, frame.LAST_RAW)
EXACT: Final = frozenset(
    re.findall("[A-Z_]+", re.findall("Only ([A-Z_, and]+) have exactly these fields", DOCUMENT)[0])
)


def of_server(state: State, name: str) -> Outcome:
    """Return the effect at a server. After the handshake one request (stream 1, complete) is under way."""
    if state is State.NEW:
        return Outcome.REFUSED
    if state is State.HANDSHAKE:
        return Outcome.VIOLATION
    if state is State.CLOSING or name in FAREWELLS or name == "a short GOAWAY":
        return Outcome.ENDS
    return Outcome.GOES_ON if name in FROM_CALLERS | FROM_BOTH else Outcome.VIOLATION


def of_client(state: State, name: str) -> Outcome:
    """Return the effect at a client. One request (stream 1) is under way."""
    if state in (State.NEW, State.CLOSING):
        return Outcome.ENDS
    if name in FAREWELLS - {"GOAWAY draining"}:
        return Outcome.ENDS
    if name in FROM_WORKERS | FROM_BOTH | {"GOAWAY draining"}:
        ends_the_last = name in {"ERROR", "END", "LAST", "LAST_BATCH", "LAST_RAW"}
        return Outcome.ENDS if state is State.DRAINING and ends_the_last else Outcome.GOES_ON
    return Outcome.VIOLATION


def with_later_fields(name: str, expected: Outcome) -> Outcome:
    """Return the effect of a frame that has more fields than the table of the page."""
    return Outcome.VIOLATION if name.split()[0] in EXACT and expected is Outcome.GOES_ON else expected


def encoded(name: str, *later_fields: str) -> bytes:
    example = FRAMES[name]
    if isinstance(example, bytes):
        return example
    return pack([*example, *later_fields]) + (b"x" if example[0] in RAW_TYPES else b"")


async def outcome(peer: Peer, *, by_server: bool) -> Outcome:
    """Return the effect that the other side shows now."""
    heard = Heard(by_server=by_server, checks_streams=False)
    try:
        if await peer.answer_to_ping(heard):
            return Outcome.GOES_ON
    except ConnectionError:
        return Outcome.ENDS
    return {None: Outcome.ENDS, "protocol_violation": Outcome.VIOLATION}[heard.goaway]


# --------------------------------------------------------------------------- the server


@asynccontextmanager
async def serving() -> AsyncIterator[TcpServer]:
    chosen = PlaneSettings.load(connect_timeout_s=1.0, cancel_grace_s=0)
    server = TcpServer(chosen, secret=SECRET, instance_id=INSTANCE)
    await server.start()

    async def hang(_: Any, context: Context) -> None:
        await asyncio.sleep(60)

    async def total(messages: Any, _: Context) -> int:
        return len([message async for message in messages])

    server.register("hang", hang)
    server.register("total", total, request_stream=True)
    try:
        yield server
    finally:
        await server.aclose()


async def reach(server: TcpServer, peer: Peer, state: State) -> None:
    """Bring the server's side of a connection into a state."""
    handshake = ClientHandshake(SECRET, WINDOW, INSTANCE)
    if state is State.HANDSHAKE:
        peer.send(handshake.first_message())
        assert await peer.reader.read(4096)
    elif state is not State.NEW:
        await peer.shake(handshake)
        peer.send(pack([frame.OPEN, 1, "hang", 0, None, None]))
        await soon(lambda: server.in_flight_count == 1, "the request has not come")
    if state is State.CLOSING:
        peer.send(pack([frame.GOAWAY, 0, "overloaded", "bye"]))


@pytest.mark.parametrize("state", State)
async def test_server_in_every_state(state: State) -> None:
    async with serving() as server:
        draining: asyncio.Task[None] | None = None
        host, port = server.address.rsplit(":", 1)
        peers: list[Peer] = []
        for number, name in enumerate(FRAMES, 1):
            peer = Peer(*await asyncio.open_connection(host, int(port)))  # its handshake has little time
            peers.append(peer)
            if state is not State.DRAINING:
                await _check_server(server, peer, state, name)
            else:
                await peer.shake(ClientHandshake(SECRET, WINDOW, INSTANCE))
                peer.send(pack([frame.OPEN, 1, "hang", 0, None, None]))
                await soon(lambda count=number: server.in_flight_count == count, "it has not come")  # type: ignore[misc]
        if state is State.DRAINING:
            draining = asyncio.ensure_future(server.drain(60))
            for peer, name in zip(peers, FRAMES, strict=True):
                assert (await peer.receive() or [])[:3] == [frame.GOAWAY, 0, "draining"]
                peer.send(encoded(name))
                assert await outcome(peer, by_server=True) is of_server(state, name), (state, name)
        for peer in peers:
            await peer.close()
        await soon(lambda: server.in_flight_count == 0, "requests are left")
        if draining is not None:
            await asyncio.wait_for(draining, 30)


async def test_server_accepts_fields_of_later_releases() -> None:
    async with serving() as server:
        host, port = server.address.rsplit(":", 1)
        for name in FRAMES:
            peer = Peer(*await asyncio.open_connection(host, int(port)))
            await reach(server, peer, State.OPEN)
            peer.send(encoded(name, "of a", "later release"))
            expected = with_later_fields(name, of_server(State.OPEN, name))
            assert await outcome(peer, by_server=True) is expected, name
            await peer.close()
            await soon(lambda: server.in_flight_count == 0, "the request is left")


async def _check_server(server: TcpServer, peer: Peer, state: State, name: str) -> None:
    await reach(server, peer, state)
    peer.send(encoded(name))
    expected = of_server(state, name)
    if expected is Outcome.REFUSED:
        said = await asyncio.wait_for(peer.reader.read(), 30)
        assert said[2:].startswith(b"\x94\xa4DYNR\x00" + pack("protocol_violation")), (state, name, said)
    else:
        assert await outcome(peer, by_server=True) is expected, (state, name)
    await peer.close()
    await soon(lambda: server.in_flight_count == 0, "the request is left")


# --------------------------------------------------------------------------- the client


@pytest.mark.parametrize("state", [State.NEW, State.OPEN, State.DRAINING, State.CLOSING])
async def test_client_in_every_state(state: State) -> None:
    for name in FRAMES:
        expected = of_client(state, name)
        assert await _client_takes(state, encoded(name), expected) is expected, (state, name)


async def test_client_accepts_fields_of_later_releases() -> None:
    for name in FRAMES:
        if name == "a short GOAWAY":  # with more fields it is none
            continue
        expected = with_later_fields(name, of_client(State.OPEN, name))
        said = encoded(name, "of a", "later release")
        assert await _client_takes(State.OPEN, said, expected) is expected, name


async def _client_takes(state: State, said: bytes, expected: Outcome) -> Outcome:
    """Return the effect of a frame at a client with one request under way."""
    verdict: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        try:
            if state is not State.NEW:
                await peer.shake(ServerHandshake(SECRET, WINDOW, INSTANCE))
                assert await peer.receive() is not None
            if state is State.DRAINING:
                peer.send(pack([frame.GOAWAY, 0, "draining", "bye"]))
            elif state is State.CLOSING:
                peer.send(pack([frame.GOAWAY, 0, "overloaded", "bye"]))
            peer.send(said)
            if expected is Outcome.ENDS:  # it may still answer in the turn in which it closes
                await asyncio.wait_for(peer.until_closed(), 30)
                verdict.set_result(Outcome.ENDS)
            else:
                verdict.set_result(await outcome(peer, by_server=False))
        finally:
            await peer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = TcpClient(PlaneSettings.load(connect_timeout_s=0.3))
    target = Target(INSTANCE, f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", "any", SECRET)
    with suppress(PlaneError, StopAsyncIteration):
        async with client.open(target, None, Context()) as stream:
            reader = asyncio.ensure_future(_exhaust(stream))
            await asyncio.wait_for(verdict, 30)
            reader.cancel()
            await asyncio.wait([reader])
    await client.aclose()
    listener.close()
    await listener.wait_closed()
    return verdict.result()


async def _exhaust(stream: Any) -> None:
    with suppress(PlaneError):
        async for _item in stream:
            pass


def test_every_frame_is_tried() -> None:
    kinds = {example[0] for example in FRAMES.values() if isinstance(example, list)}
    assert kinds | {frame.OPEN_RAW, frame.DATA_RAW, frame.LAST_RAW} >= set(range(1, 17))
