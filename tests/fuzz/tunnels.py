"""Connections through a broker that loses, repeats and mixes up messages, and messages of foreign processes.

Bytes arrive in order, or the connection ends. No message raises, is answered without end, or makes a side
hold more than its window; and after a check of its peer no connection outlives the other side's end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from hypothesis import event, given
from hypothesis import strategies as st

from dynamo_redis.planes.base import Describe
from dynamo_redis.planes.tunnel.link import LinkOwner
from dynamo_redis.planes.tunnel.transport import TunnelTransport
from dynamo_redis.planes.tunnel.tunnels import Tunnels
from dynamo_redis.wire import tunnel
from dynamo_redis.wire.tunnel import WINDOW_BYTES, Kind
from tests.fuzz.rounds import Property
from tests.fuzz.watch import complaints

CONTENT_BYTES: Final = 100_000
MOST_MESSAGES: Final = 10_000
"""More than any conversation here needs: two sides that answer each other for ever are found by it."""

_PERIOD: Final = 251
_PATTERN: Final = bytes(range(_PERIOD)) * (WINDOW_BYTES // _PERIOD + 3)
"""Bytes to write from any place on: a gap or a repetition in them shows."""

SideName = Literal["caller", "server"]
Fate = Literal["lost", "twice", "late"]


@dataclass(frozen=True)
class Write:
    """A side writes so many bytes."""

    side: SideName
    size: int


@dataclass(frozen=True)
class Act:
    """A side does this to its transport."""

    side: SideName
    method: Literal["pause_reading", "resume_reading", "close", "abort"]


@dataclass(frozen=True)
class Carry:
    """The broker carries so many messages; then the next one has a fate."""

    count: int
    fate: Fate | None


@dataclass(frozen=True)
class Foreign:
    """A process that is no peer sends a message to a side. `by_id`: with the id of the connection."""

    side: SideName
    sender: str
    kind: int
    number: int
    content: bytes
    by_id: bool


Step = Write | Act | Carry | Foreign | bytes
"""Bytes are sent to both sides as they are."""


class Broker:
    """Carries messages in the order in which they were sent, when it is told to."""

    def __init__(self) -> None:
        self.owners: dict[str, LinkOwner] = {}
        self.waiting: deque[tuple[str, str, bytes, bytes]] = deque()
        self.carried_count = 0

    def link(self, address: str) -> Link:
        return Link(self, address)

    def carry(self) -> None:
        """Deliver the oldest message."""
        receiver, sender, connection_id, message = self.waiting.popleft()
        self.carried_count += 1
        assert self.carried_count < MOST_MESSAGES, "messages without end"
        if receiver in self.owners:
            self.owners[receiver].on_message(message, sender)
        elif sender in self.owners:
            self.owners[sender].on_unreachable(connection_id)


class Link:
    """Implements `planes.tunnel.link.Link` on a `Broker`."""

    def __init__(self, broker: Broker, address: str) -> None:
        self._broker = broker
        self.address = address
        self.content_bytes = CONTENT_BYTES
        self.is_behind = False

    async def open(self, owner: LinkOwner) -> None:
        self._broker.owners[self.address] = owner

    async def announce(self, describe: Describe) -> None:
        raise NotImplementedError

    def send(self, receiver: str, connection_id: bytes, message: bytes) -> None:
        self._broker.waiting.append((receiver, self.address, connection_id, message))

    async def aclose(self) -> None:
        self._broker.owners.pop(self.address, None)


class Side(asyncio.BufferedProtocol):
    """One end of the connection: keeps what it has written and received."""

    def __init__(self) -> None:
        self.written, self.received = bytearray(), bytearray()
        self.ends: list[Exception | None] = []
        self.transport: TunnelTransport
        self._buffer = bytearray(70_000)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, TunnelTransport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self._buffer[:nbytes]

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.ends.append(exc)

    def write(self, size: int) -> None:
        if not self.transport.is_closing():
            first = len(self.written) % _PERIOD
            data = _PATTERN[first : first + size]
            self.written += data
            self.transport.write(data)


class Conversation:
    """A caller and a server of one connection, and the broker between them."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.sides: dict[SideName, Side] = {"caller": Side()}
        self.others: list[Side] = []
        self._tunnels = (
            Tunnels(self.broker.link("caller")),
            Tunnels(self.broker.link("server"), self._accept),
        )
        self.is_faultless = self.is_pure = True

    def _accept(self) -> Side:
        side = Side()
        if "server" in self.sides:
            self.others.append(side)
        else:
            self.sides["server"] = side
        return side

    async def hold(self, steps: list[Step]) -> None:
        """Take the steps, carry what is left, and check. Raises AssertionError."""
        with complaints(with_garbage=False) as found:
            for tunnels in self._tunnels:
                await tunnels.start()
            self._tunnels[0].connect("server", self.sides["caller"])
            self.broker.carry()  # OPEN
            for step in steps:
                self._take(step)
                await asyncio.sleep(0)
                self._check_bounds()
            await self._settle()
            self._check_bytes()
            for tunnels in self._tunnels:
                tunnels._check()
            await self._settle()
            self._check_ends()
            for tunnels in self._tunnels:
                await tunnels.aclose()
            await asyncio.sleep(0)
            for side in (*self.sides.values(), *self.others):
                assert len(side.ends) == 1, side.ends
            found.check()

    def _take(self, step: Step) -> None:
        broker = self.broker
        match step:
            case Write(side, size):
                self.sides[side].write(size)
            case Act(side, method):
                getattr(self.sides[side].transport, method)()
            case Carry(count, fate):
                for _ in range(min(count, len(broker.waiting))):
                    broker.carry()
                if fate is not None and broker.waiting:
                    self.is_faultless = False
                    message = broker.waiting.popleft()
                    if fate == "twice":
                        broker.waiting.extendleft((message, message))
                    elif fate == "late":
                        broker.waiting.append(message)
            case Foreign(side, sender, kind, number, content, by_id):
                self.is_faultless = False
                self.is_pure &= not by_id
                connection_id = self.sides[side].transport._id if by_id else bytes(16)
                head = bytes([kind]) + connection_id + number.to_bytes(8, "big")
                broker.owners[side].on_message(head + content, sender)
            case bytes():
                for owner in broker.owners.values():
                    owner.on_message(step, "caller")
                    owner.on_message(step, "")

    async def _settle(self) -> None:
        """Carry all messages, with all readers reading."""
        for side in self.sides.values():
            side.transport.resume_reading()
        while True:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if not self.broker.waiting:
                return
            self.broker.carry()

    def _check_bounds(self) -> None:
        for side in (*self.sides.values(), *self.others):
            held_bytes = sum(map(len, side.transport._held))
            assert held_bytes <= WINDOW_BYTES, held_bytes
            assert len(side.ends) <= 1

    def _check_bytes(self) -> None:
        caller, server = self.sides["caller"], self.sides["server"]
        for writer, reader in ((caller, server), (server, caller)):
            if self.is_pure:
                assert writer.written.startswith(reader.received)
            if self.is_faultless and not caller.transport.is_closing():
                assert reader.received == writer.written

    def _check_ends(self) -> None:
        if self.is_pure:
            caller, server = (bool(side.ends) for side in self.sides.values())
            assert caller == server, "one side outlives the other"
        for tunnels in self._tunnels:
            live = [transport for transport in tunnels._open.values() if transport._has_ended]
            assert not live, "an ended connection is kept"


_sides: st.SearchStrategy[Any] = st.sampled_from(("caller", "server"))
_sizes = st.integers(0, 10) | st.sampled_from((CONTENT_BYTES, CONTENT_BYTES + 1, 300_000, WINDOW_BYTES + 1))
_numbers = st.integers(0, 3) | st.sampled_from((WINDOW_BYTES, 2**63, 2**64 - 1))
_kinds = st.sampled_from(list(Kind)) | st.integers(0, 255)
_writes = st.builds(Write, _sides, _sizes)
_carries = st.builds(Carry, st.integers(0, 8), st.none())
_faulty = st.builds(Carry, st.integers(0, 8), st.sampled_from(("lost", "twice", "late")))
_pauses = st.builds(Act, _sides, st.sampled_from(("pause_reading", "resume_reading")))
_ends = st.builds(Act, _sides, st.sampled_from(("close", "abort")))
_foreign = st.builds(
    Foreign,
    _sides,
    st.sampled_from(("caller", "server", "absent", "", "a b")),
    _kinds,
    _numbers,
    st.binary(max_size=5) | st.just(bytes(300_000)),
    st.booleans(),
)
_damaged = st.builds(
    lambda kind, number, cut: tunnel.encode_head(kind, bytes(16), number)[:cut],
    st.sampled_from(list(Kind)),
    _numbers,
    st.integers(0, tunnel.HEAD_BYTES),
)
_steps: st.SearchStrategy[list[Any]] = st.one_of(
    st.lists(_writes | _carries | _pauses, max_size=14),
    st.lists(_writes | _carries | _pauses | _ends | _faulty, max_size=14),
    st.lists(
        _writes | _carries | _pauses | _ends | _foreign | _damaged | st.binary(max_size=40), max_size=14
    ),
)


def tunnels_property(run: Callable[[Any], None] = asyncio.run) -> Property:
    """Make the property: any conversation through any broker passes the checks."""

    @given(_steps)
    def property_of_tunnels(steps: list[Step]) -> None:
        conversation = Conversation()
        run(conversation.hold(steps))
        event(f"faultless: {conversation.is_faultless}, pure: {conversation.is_pure}")

    return property_of_tunnels
