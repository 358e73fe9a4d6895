"""Connections through a broker: bytes arrive whole and in order, or the connection ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from dynamo_redis.planes.base import Describe
from dynamo_redis.planes.tunnel.link import LinkOwner
from dynamo_redis.planes.tunnel.transport import TunnelTransport
from dynamo_redis.planes.tunnel.tunnels import Tunnels
from dynamo_redis.wire import tunnel
from dynamo_redis.wire.tunnel import WINDOW_BYTES, Kind
from tests.tcp_plane import eventually

CONTENT_BYTES = 1000


class Broker:
    """Carries messages between links, in order. `fate` says how often each arrives: 0, 1 or 2 times."""

    def __init__(self) -> None:
        self.links: dict[str, BrokerLink] = {}
        self.fate: Callable[[bytes], int] = lambda message: 1
        self.carried_count = 0

    def link(self, address: str) -> BrokerLink:
        self.links[address] = BrokerLink(self, address)
        return self.links[address]


class BrokerLink:
    """Implements `Link` on a `Broker`."""

    def __init__(self, broker: Broker, address: str) -> None:
        self._broker = broker
        self._address = address
        self.owner: LinkOwner | None = None

    @property
    def address(self) -> str:
        return self._address

    @property
    def content_bytes(self) -> int:
        return CONTENT_BYTES

    async def open(self, owner: LinkOwner) -> None:
        self.owner = owner

    @property
    def is_behind(self) -> bool:
        return False

    async def announce(self, describe: Describe) -> None:
        raise NotImplementedError

    def send(self, receiver: str, connection_id: bytes, message: bytes) -> None:
        loop = asyncio.get_running_loop()
        link = self._broker.links.get(receiver)
        if link is None or link.owner is None:
            assert self.owner is not None
            loop.call_soon(self.owner.on_unreachable, connection_id)
            return
        for _ in range(self._broker.fate(message)):
            self._broker.carried_count += 1
            loop.call_soon(link.owner.on_message, message, self._address)

    async def aclose(self) -> None:
        self._broker.links.pop(self._address, None)


class Peer(asyncio.BufferedProtocol):
    """Keeps what it receives."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost: list[Exception | None] = []
        self.ended = False
        self.is_paused = False
        self._buffer = bytearray(777)
        self.transport: TunnelTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, TunnelTransport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self._buffer[:nbytes]

    def eof_received(self) -> bool:
        self.ended = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False


@asynccontextmanager
async def connected(broker: Broker) -> AsyncIterator[tuple[Peer, Peer]]:
    accepted: list[Peer] = []

    def accept() -> Peer:
        accepted.append(Peer())
        return accepted[-1]

    server, client = Tunnels(broker.link("server"), accept), Tunnels(broker.link("client"))
    await server.start()
    await client.start()
    caller = Peer()
    client.connect("server", caller)
    await eventually(lambda: bool(accepted))
    try:
        yield caller, accepted[0]
    finally:
        await client.aclose()
        await server.aclose()


@pytest.mark.parametrize("size_bytes", [1, CONTENT_BYTES, CONTENT_BYTES + 1, 100_000, 3 * WINDOW_BYTES])
async def test_bytes_arrive_whole_both_ways(size_bytes: int) -> None:
    data = random.Random(1).randbytes(size_bytes)
    async with connected(Broker()) as (caller, server):
        caller.transport.write(data)
        server.transport.writelines([data[:10], data[10:]])
        await eventually(lambda: len(caller.received) == len(server.received) == size_bytes, 10)
        assert bytes(server.received) == bytes(caller.received) == data


async def test_a_slow_reader_holds_up_its_writer() -> None:
    broker = Broker()
    async with connected(broker) as (caller, server):
        server.transport.pause_reading()
        caller.transport.set_write_buffer_limits(high=10_000)
        caller.transport.write(bytes(3 * WINDOW_BYTES))
        await asyncio.sleep(0.05)
        assert caller.is_paused
        assert caller.transport.get_write_buffer_size() == 2 * WINDOW_BYTES
        assert broker.carried_count <= WINDOW_BYTES // CONTENT_BYTES + 3
        assert not server.received
        server.transport.resume_reading()
        await eventually(lambda: len(server.received) == 3 * WINDOW_BYTES, 10)
        assert not caller.is_paused


@pytest.mark.parametrize("fate", [0, 2], ids=["lost", "twice"])
async def test_a_message_lost_or_repeated_ends_the_connection(fate: int) -> None:
    broker = Broker()
    async with connected(broker) as (caller, server):
        caller.transport.write(b"first")
        await eventually(lambda: bytes(server.received) == b"first")
        broker.fate = lambda message: fate if message[0] == Kind.DATA else 1
        caller.transport.write(b"second")
        await asyncio.sleep(0.01)
        broker.fate = lambda message: 1
        caller.transport.write(b"third")
        await eventually(lambda: bool(caller.lost) and bool(server.lost))
        assert isinstance(server.lost[0], ConnectionResetError)
        assert bytes(server.received) in (b"first", b"firstsecond")


async def test_close_hands_over_what_was_written() -> None:
    async with connected(Broker()) as (caller, server):
        data = bytes(2 * WINDOW_BYTES)
        caller.transport.write(data)
        caller.transport.close()
        await eventually(lambda: server.ended and bool(caller.lost) and bool(server.lost), 10)
        assert bytes(server.received) == data
        assert caller.lost == [None]


async def test_waiting_bytes_end_with_a_peer_that_closes() -> None:
    """The peer takes none of them any more, and says nothing else."""
    async with connected(Broker()) as (caller, server):
        server.transport.pause_reading()
        caller.transport.write(bytes(WINDOW_BYTES + 1))
        server.transport.close()
        await eventually(lambda: caller.lost and server.lost)
        assert caller.ended
        assert caller.transport.get_write_buffer_size() == 0


async def test_abort_ends_the_peer_too() -> None:
    async with connected(Broker()) as (caller, server):
        caller.transport.abort()
        await eventually(lambda: bool(server.lost))
        assert isinstance(server.lost[0], ConnectionResetError)
        assert caller.lost == [None]


async def test_a_receiver_that_is_not_there_ends_the_connection() -> None:
    broker = Broker()
    client = Tunnels(broker.link("client"))
    await client.start()
    caller = Peer()
    client.connect("absent", caller)
    await eventually(lambda: bool(caller.lost))
    assert isinstance(caller.lost[0], ConnectionRefusedError)
    await client.aclose()


async def test_a_peer_that_forgot_the_connection_resets_it() -> None:
    broker = Broker()
    async with connected(broker) as (caller, server):
        server.transport.end(None)
        caller.transport.write(b"more")
        await eventually(lambda: bool(caller.lost))
        assert isinstance(caller.lost[0], ConnectionResetError)


async def test_messages_that_are_none_of_a_tunnel_are_skipped() -> None:
    broker = Broker()
    async with connected(broker) as (caller, server):
        owner = broker.links["server"].owner
        assert owner is not None
        for message in (b"", b"GET / HTTP/1.1", b"\xff" * 100, bytes(25), bytes([Kind.DATA]) + bytes(24)):
            owner.on_message(message, "")
            owner.on_message(message, "client")
        caller.transport.write(b"still there")
        await eventually(lambda: bytes(server.received) == b"still there")


async def test_another_version_is_refused() -> None:
    broker = Broker()
    async with connected(broker):
        owner, other = broker.links["server"].owner, broker.links["client"]
        assert owner is not None
        answers: list[bytes] = []
        other.owner = None

        def note(message: bytes) -> int:
            answers.append(message)
            return 1

        broker.fate = note
        connection_id = bytes(range(16))
        broker.links["other"] = other
        other.owner = _Ignores()
        owner.on_message(tunnel.encode_head(Kind.OPEN, connection_id, tunnel.VERSION + 1), "other")
        await eventually(lambda: bool(answers))
        assert tunnel.decode(answers[0])[:2] == (Kind.RESET, connection_id)


class _Ignores:
    def on_message(self, message: bytes, sender: str) -> None: ...

    def on_unreachable(self, connection_id: bytes, reason: str = "") -> None: ...

    def on_lost(self, reason: str) -> None: ...


async def test_a_broker_that_was_away_ends_all_connections() -> None:
    broker = Broker()
    async with connected(broker) as (caller, server):
        for link in broker.links.values():
            assert link.owner is not None
            link.owner.on_lost("the broker was away")
        await eventually(lambda: bool(caller.lost) and bool(server.lost))
        assert str(caller.lost[0]) == str(server.lost[0]) == "the broker was away"


async def test_a_peer_that_sends_too_much_is_cut_off() -> None:
    """A paused reader holds a bounded amount, whatever the peer does."""
    sent: list[bytes] = []
    protocol, connection_id = Peer(), bytes(16)
    transport = TunnelTransport(
        asyncio.get_running_loop(),
        connection_id,
        protocol,
        content_bytes=CONTENT_BYTES,
        send=sent.append,
        on_end=lambda: None,
    )
    transport.pause_reading()
    part = bytes(WINDOW_BYTES // 4)
    for number in range(4):
        transport.on_message(tunnel.Message(Kind.DATA, connection_id, number, memoryview(part)))
    assert not transport.is_closing()
    transport.on_message(tunnel.Message(Kind.DATA, connection_id, 4, memoryview(b"x")))
    assert transport.is_closing()
    assert [tunnel.decode(message).kind for message in sent] == [Kind.RESET]


async def test_a_reset_behind_the_end_costs_no_bytes() -> None:
    """The peer answers reports with RESET once it has closed, while bytes may still wait for the reader."""
    protocol, connection_id = Peer(), bytes(16)
    transport = TunnelTransport(
        asyncio.get_running_loop(),
        connection_id,
        protocol,
        content_bytes=CONTENT_BYTES,
        send=lambda _: None,
        on_end=lambda: None,
    )
    transport.pause_reading()
    transport.on_message(tunnel.Message(Kind.DATA, connection_id, 0, memoryview(b"all")))
    transport.on_message(tunnel.Message(Kind.CLOSE, connection_id, 1, memoryview(b"")))
    transport.on_message(tunnel.Message(Kind.RESET, connection_id, 0, memoryview(b"")))
    transport.resume_reading()
    await eventually(lambda: protocol.lost)
    assert bytes(protocol.received) == b"all"


async def test_a_protocol_that_raises_ends_its_connection_only() -> None:
    """The task that reads the broker's messages goes on."""

    class Broken(Peer):
        def buffer_updated(self, nbytes: int) -> None:
            raise LookupError("broken")

    broker, broken = Broker(), Broken()
    accepting = Tunnels(broker.link("server"), lambda: broken)
    await accepting.start()
    caller = Tunnels(broker.link("caller"))
    await caller.start()
    peer = Peer()
    caller.connect("server", peer).write(b"bytes")
    await eventually(lambda: broken.lost)
    assert isinstance(broken.lost[0], LookupError)
    await caller.aclose()
    await accepting.aclose()
