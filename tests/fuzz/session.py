"""Whole conversations with a server and with a client: sensible frames, nonsense, and cuts, in any order.

Whatever one side says, the other ends the connection with a typed reason or goes on. It says nothing itself
that the tables and its credit do not allow, harms no other connection, logs no error, and keeps nothing.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import uvloop
from hypothesis import event, given
from hypothesis import strategies as st

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import PlaneError, ProtocolViolation
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.fuzz import reference
from tests.fuzz.peer import PATIENCE_S, WINDOW, Heard, Peer
from tests.fuzz.streams import MAX_PAYLOAD_BYTES, Long, pieces, scalars
from tests.fuzz.watch import Complaints, Newcomers, complaints

SECRET: Final = b"a secret of the instance, random"
INSTANCE: Final = 7

End = Literal["close", "half-close", "reset"]


@dataclass(frozen=True)
class Turn:
    """Let the other side run for `turns` of the event loop; with `release`, its handlers continue."""

    turns: int
    release: bool


Step = list[Any] | Turn | bytes
"""A list is a frame; bytes are sent as they are."""

# --------------------------------------------------------------------------- what is said

_ids = st.integers(1, 4) | st.sampled_from((1, 2, 3, 0, -1, 2**31 - 1, 2**31, None, True))
_values = scalars | st.lists(scalars, max_size=3) | st.integers(0, 20)
_headers = st.none() | st.sampled_from(
    (
        {},
        {"id": "x"},
        {"deadline_ms": 0},
        {"deadline_ms": 3},
        {"id": 5},
        {"deadline_ms": 2**53},
        {"meta": {"a": "b"}},
        {"meta": {"a": 1}},
        {"later": [1]},
        [],
    )
)
_subjects = st.sampled_from(("echo", "count", "wait", "total", "unread", "hang", "nowhere", 5))


def _frame(kind: int, *fields: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(*fields).map(lambda values: [kind, *values])


_items = st.lists(_values, max_size=8)
_bytes = st.builds(
    lambda kind, stream_id, size, sent: pack([kind, stream_id, size, 1]) + bytes(sent),
    st.sampled_from((frame.DATA_RAW, frame.LAST_RAW)),
    st.integers(1, 4),
    st.integers(0, 20),
    st.integers(0, 20),
)

_by_client = st.one_of(
    _frame(frame.OPEN, _ids, _subjects, st.sampled_from((0, 1, 0, 1, 2, -1)), _headers, _values),
    _frame(frame.OPEN, _ids, st.sampled_from(("total", "unread")), st.just(1), st.none(), _values),
    _frame(frame.CREDIT, _ids, st.integers(1, 5) | scalars),
    _frame(frame.CANCEL, _ids, st.integers(1, 2) | scalars),
)
_by_both = st.one_of(
    _frame(frame.DATA, _ids, _values),
    _frame(frame.LAST, _ids, _values),
    _frame(frame.BATCH, _ids, _items),
    _frame(frame.LAST_BATCH, _ids, _items),
    _frame(frame.END, _ids),
    _frame(frame.CREDIT, _ids, st.integers(1, 5) | scalars),
    _frame(frame.PING, st.sampled_from((0, 0, 1)), st.integers(0, 9)),
    _frame(frame.CREDIT, _ids, st.integers(1, 5), _values),
    _frame(frame.PONG, st.just(0), st.integers(0, 9)),
    _frame(64, _ids, _values),
    _frame(17, _ids),
    _frame(-frame.CANCEL, _ids),
    _bytes,
)
_by_server = st.one_of(
    _frame(frame.ACCEPT, _ids),
    _frame(
        frame.ERROR, _ids, st.sampled_from(("overloaded", "draining", "new", 5)), st.just("why"), _headers
    ),
)
_goaway = _frame(frame.GOAWAY, st.just(0), st.sampled_from(("draining", "overloaded", "x", 5)), _values)
_turns = st.builds(Turn, st.integers(0, 4), st.booleans())
_anything = pieces.map(lambda parts: b"".join(map(bytes, parts[:2])))
_ends = st.sampled_from(("close", "half-close", "reset"))


_nested = st.builds(lambda depth: bytes(Long(b"", b"\x91", depth, b"\xc0")), st.integers(1, 1010))
_hello_fields = (b"\xa4DYNR", b"\x01", b"\x00", b"\x06", b"\x07", pack(bytes(32)), pack(bytes(32)))
_refusal_fields = (b"\xa4DYNR", b"\x00", pack("overloaded"), pack("full"))


def _hello(fields: tuple[bytes, ...], changes: dict[int, bytes], length_off: int) -> bytes:
    """A handshake's message, with some fields replaced and perhaps a wrong length."""
    changed = [changes.get(index, field) for index, field in enumerate(fields)]
    body = bytes((0x90 + len(changed),)) + b"".join(changed)
    return (len(body) + length_off).to_bytes(2, "big") + body


_hellos: st.SearchStrategy[Step] = st.builds(
    _hello,
    st.sampled_from((_hello_fields, _hello_fields[:-1], _refusal_fields, (pack(bytes(32)),), (pack(b""),))),
    st.dictionaries(st.integers(0, 6), st.one_of(scalars.map(pack), _nested), max_size=2),
    st.sampled_from((0, 0, 0, 0, -1, 1, 2000)),
)


def _openings(kinds: list[tuple[str, Any]]) -> list[Step]:
    """Proper requests, numbered as they come."""
    return [
        [frame.OPEN, stream_id, subject, int(subject in ("total", "unread")), None, request]
        for stream_id, (subject, request) in enumerate(kinds, 1)
    ]


_requests = st.lists(
    st.tuples(
        st.sampled_from(("echo", "count", "count", "wait", "total", "unread", "hang")), st.integers(0, 29)
    ),
    max_size=3,
).map(_openings)


def _script(
    own: st.SearchStrategy[Any], begins: st.SearchStrategy[list[Step]]
) -> st.SearchStrategy[list[Step]]:
    """A valid frame first, then mostly valid frames."""
    sensible = st.one_of(own, own, _by_both, _turns)
    more = st.lists(st.one_of(sensible, sensible, sensible, _goaway, _anything), max_size=12)
    return st.tuples(begins, more).map(lambda both: [*both[0], *both[1]])


# --------------------------------------------------------------------------- where it is said


class Arena:
    """An event loop with a server, a client that must stay undisturbed, and a listener for clients."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._stack = ExitStack()
        self._released = asyncio.Event()
        self._new = Newcomers()
        self._found: Complaints
        self._server: TcpServer
        self._bystander: TcpClient
        self.settings = PlaneSettings.load(
            channel_buffer_count=WINDOW,
            max_message_bytes=MAX_PAYLOAD_BYTES,
            max_in_flight_count=3,
            max_queued_count=1,
        )

    def __enter__(self) -> Self:
        self._loop.run_until_complete(self._open())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()

    def run(self, conversation: Coroutine[Any, Any, None]) -> None:
        """Run a conversation, and check that nothing is left of it."""
        self._loop.run_until_complete(self._run(conversation))

    async def _run(self, conversation: Coroutine[Any, Any, None]) -> None:
        self._found.messages.clear()
        await conversation
        self._released.set()
        await soon(lambda: self._server.in_flight_count == 0, "requests are left")
        await soon(lambda: self._server.connection_count == 1, "connections are left")
        assert await self._ask("still there?") == "still there?"
        self._found.check()

    async def _ask(self, request: Any) -> Any:
        async with self._bystander.open(self.target, request, Context()) as stream:
            return await anext(stream)

    async def _open(self) -> None:
        self._found = self._stack.enter_context(complaints())
        self._server = TcpServer(self.settings, secret=SECRET, instance_id=INSTANCE)
        await self._server.start()
        self.target = Target(INSTANCE, self._server.address, "echo", SECRET)
        for single in (self._echo, self._count, self._wait, self._hang):
            self._server.register(single.__name__[1:], single)
        for streamed in (self._total, self._unread):
            self._server.register(streamed.__name__[1:], streamed, request_stream=True)
        self._bystander = TcpClient(PlaneSettings.load())
        await self._ask(None)

    async def _close(self) -> None:
        await self._bystander.aclose()
        await self._server.aclose()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        del self._bystander, self._server
        await soon(lambda: not self._new.census("planes.tcp"), "objects are left")
        self._stack.close()

    # ------------------------------------------------------------------- what the server serves

    async def _echo(self, request: Any, _: Context) -> Any:
        return request

    async def _count(self, request: Any, _: Context) -> AsyncIterator[int]:
        for number in range(request if type(request) is int and 0 <= request < 30 else 3):
            yield number

    async def _wait(self, request: Any, context: Context) -> AsyncIterator[Any]:
        yield request
        while not context.is_stopped() and not self._released.is_set():
            await asyncio.sleep(0)
        yield b"x" * 70_000

    async def _hang(self, _: Any, __: Context) -> None:
        await self._released.wait()

    async def _total(self, messages: AsyncIterator[Any], _: Context) -> AsyncIterator[int]:
        async for _message in messages:
            yield 1

    async def _unread(self, _: AsyncIterator[Any], __: Context) -> None:
        await self._released.wait()

    # ------------------------------------------------------------------- with the server

    async def at_the_door(self, script: list[Step], end: End) -> None:
        """Send the script to the server instead of a handshake."""
        host, _, port = self._server.address.rpartition(":")
        peer = Peer(*await asyncio.open_connection(host, int(port)))
        try:
            await self._say_all(peer, script, bytearray())
            await self._leave(peer, end)
        finally:
            await peer.close()

    async def with_server(self, script: list[Step], end: End) -> None:
        """Send the script to the server, and check its frames."""
        self._released.clear()
        host, _, port = self._server.address.rpartition(":")
        peer, heard, said = (
            Peer(*await asyncio.open_connection(host, int(port))),
            Heard(by_server=True),
            bytearray(),
        )
        try:
            await peer.shake(ClientHandshake(SECRET, WINDOW, INSTANCE))
            await self._say_all(peer, script, said)
            await self._conclude(peer, heard, bytes(said), end)
        finally:
            await peer.close()

    async def _say_all(self, peer: Peer, script: list[Step], said: bytearray) -> None:
        for step in script:
            said += await self._say(peer, step)

    async def _say(self, peer: Peer, step: Step) -> bytes:
        if isinstance(step, Turn):
            if step.release:
                self._released.set()
            for _ in range(step.turns):
                await asyncio.sleep(0)
            return b""
        data = step if isinstance(step, bytes) else pack(step)
        peer.send(data)
        return data

    async def _conclude(self, peer: Peer, heard: Heard, said: bytes, end: End) -> None:
        """Check whether the other side still answers, and leave."""
        understood = reference.decode(said, MAX_PAYLOAD_BYTES)
        heard.expect(understood.frames)
        if understood.violation or understood.between_frames:
            lives = await peer.answer_to_ping(heard)
            assert not (lives and understood.violation), "a violation went unnoticed"
            assert heard.goaway in (None, ProtocolViolation.code), heard.goaway
            event("lives" if lives else "was closed")
        await self._leave(peer, end)

    async def _leave(self, peer: Peer, end: End) -> None:
        if peer.writer.transport.is_closing():
            return
        if end == "half-close":
            with suppress(OSError):
                peer.writer.write_eof()
                async with asyncio.timeout(PATIENCE_S):
                    await peer.until_closed()
        elif end == "reset":
            reset(peer.writer)

    # ------------------------------------------------------------------- with a client

    async def with_client(self, script: list[Step], end: End, shakes: bool) -> None:
        """Serve a client that has requests of all kinds under way, and check how they end."""
        done: asyncio.Future[None] = self._loop.create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer, heard, said = Peer(reader, writer), Heard(by_server=False), bytearray()
            try:
                if shakes:
                    await peer.shake(ServerHandshake(SECRET, WINDOW, INSTANCE))
                await self._say_all(peer, script, said)
                if shakes:
                    await self._conclude(peer, heard, bytes(said), end)
                if not done.done():
                    done.set_result(None)
            except ConnectionError:
                if not done.done():
                    done.set_result(None)
            except AssertionError as exc:
                if not done.done():
                    done.set_exception(exc)
            finally:
                await peer.close()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = TcpClient(self.settings)
        address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            target = Target(INSTANCE, address, "echo", SECRET)
            readers = [self._read(client, target, kind) for kind in range(3)]
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*readers)
            assert client.pending_count == 0
            await asyncio.wait_for(done, PATIENCE_S)
        finally:
            await client.aclose()
            listener.close()
            await listener.wait_closed()

    async def _read(self, client: TcpClient, target: Target, kind: int) -> None:
        """Run one request to its end. Raises no error but those that a request may end with."""
        options: dict[str, Any] = {"messages": _messages()} if kind == 2 else {}
        request = bytes(70_000) if kind == 1 else kind
        with suppress(PlaneError):
            async with client.open(target, request, Context(), **options) as stream:
                async for _item in stream:
                    pass


async def _messages() -> AsyncIterator[int]:
    for number in range(12):
        yield number


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection by RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def soon(condition: Callable[[], bool], otherwise: str) -> None:
    """Wait for `condition`, busily at first. Raises AssertionError."""
    deadline, turns = time.monotonic() + PATIENCE_S, 0
    while not condition():
        assert time.monotonic() < deadline, otherwise
        turns += 1
        await asyncio.sleep(0 if turns < 100 else 0.002)


# --------------------------------------------------------------------------- the properties


def properties(arena: Arena) -> dict[str, Callable[[], None]]:
    """Return the properties of every conversation, by the kind of its peer."""

    @given(_script(_by_client, _requests), _ends)
    def property_of_server(script: list[Step], end: End) -> None:
        arena.run(arena.with_server(script, end))

    @given(_script(_by_server, st.just([])), _ends)
    def property_of_client(script: list[Step], end: End) -> None:
        arena.run(arena.with_client(script, end, shakes=True))

    @given(st.lists(_hellos | _anything | _turns, max_size=3), _ends, st.booleans())
    def property_of_handshake(script: list[Step], end: End, by_client: bool) -> None:
        arena.run(
            arena.at_the_door(script, end) if by_client else arena.with_client(script, end, shakes=False)
        )

    return {"server": property_of_server, "client": property_of_client, "handshake": property_of_handshake}
