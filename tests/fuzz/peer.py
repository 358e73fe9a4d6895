"""A bare peer that sends given frames, and checks the frames that it receives."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

import msgpack

from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from dynamo_redis.wire.session import CLIENT_STEPS, SERVER_STEPS, ClientStream, ServerStream

WINDOW: Final = 6
"""The credit that both sides grant at first."""

PATIENCE_S: Final = 30.0
"""Seconds that an answer may take: only a failing run waits that long."""

_TOKEN: Final = 0x7FFF_0001
_ITEMS: Final = frozenset({frame.DATA, frame.LAST, frame.DATA_RAW, frame.LAST_RAW})
_BATCHES: Final = frozenset({frame.BATCH, frame.LAST_BATCH})
_RAW: Final = frozenset({frame.OPEN_RAW, frame.DATA_RAW, frame.LAST_RAW})


class Peer:
    """One connection, written and read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=1 << 26)

    async def shake(self, handshake: ClientHandshake | ServerHandshake) -> None:
        """Do the handshake."""
        if isinstance(handshake, ClientHandshake):
            self.writer.write(handshake.first_message())
        while not (handshake.server if isinstance(handshake, ClientHandshake) else handshake.done):
            data = await self.reader.read(4096)
            if not data:
                raise ConnectionResetError
            answer, rest = handshake.feed(memoryview(data))
            self.writer.write(answer)
            self._unpacker.feed(bytes(rest))

    def send(self, data: bytes) -> None:
        """Write, if the connection still stands."""
        if not self.writer.transport.is_closing():
            self.writer.write(data)

    async def receive(self) -> list[Any] | None:
        """Return the next frame, with the bytes that it announces; None at the end of the connection."""
        while True:
            with suppress(msgpack.OutOfData):
                received: list[Any] = self._unpacker.unpack()
                return await self._with_payload(received) if received[0] in _RAW else received
            if not await self._read():
                return None

    async def _with_payload(self, received: list[Any]) -> list[Any] | None:
        missing, payload = received[-2], b""
        while len(payload) < missing:
            payload += self._unpacker.read_bytes(missing - len(payload))
            if len(payload) < missing and not await self._read():
                return None
        return [*received, payload]

    async def _read(self) -> bool:
        try:
            data = await self.reader.read(1 << 18)
        except ConnectionError:
            return False
        self._unpacker.feed(data)
        return bool(data)

    async def until_closed(self) -> None:
        """Read to the end of the connection, whatever comes."""
        with suppress(ConnectionError):
            while await self.reader.read(1 << 16):
                pass

    async def answer_to_ping(self, heard: Heard) -> bool:
        """Return whether the other side answers a PING. Frames before the answer go to `heard`."""
        self.send(pack([frame.PING, 0, _TOKEN]))
        async with asyncio.timeout(PATIENCE_S):
            while (received := await self.receive()) is not None:
                if received == [frame.PONG, 0, _TOKEN]:
                    return True
                heard.take(received)
        return False

    async def close(self) -> None:
        """Drop the connection."""
        self.writer.transport.abort()
        with suppress(OSError):
            await self.writer.wait_closed()


class Heard:
    """The frames of the other side, each checked against the state tables and the credit that it has."""

    def __init__(self, *, by_server: bool, checks_streams: bool = True) -> None:
        self._by_server = by_server
        self._checks_streams = checks_streams
        self._client: dict[int, ClientStream] = {}
        self._server: dict[int, ServerStream] = {}
        self._credit: dict[int, int] = {}
        self.goaway: str | None = None

    def expect(self, said: list[list[Any]]) -> None:
        """Note a frame of this side, which opens a stream or gives credit."""
        for one in said:
            stream_id = one[1]
            if type(stream_id) is not int or len(one) < 3:
                continue
            if one[0] in (frame.OPEN, frame.OPEN_RAW):
                self._client.setdefault(stream_id, ClientStream.WAITING)
            elif one[0] == frame.CREDIT and type(one[2]) is int:
                self._credit[stream_id] = self._credit.get(stream_id, WINDOW) + max(one[2], 0)

    def take(self, received: list[Any]) -> None:
        """Check a received frame. Raises AssertionError if it is not allowed now."""
        assert self.goaway is None, f"{received} after GOAWAY"
        kind, stream_id = received[:2]
        if stream_id == 0:
            assert kind in (frame.GOAWAY, frame.PING, frame.PONG), received
            if kind == frame.GOAWAY:
                assert type(received[2]) is str, received
                assert type(received[3]) is str, received
                self.goaway = received[2]
        elif not self._checks_streams:
            pass
        elif self._by_server:
            after = CLIENT_STEPS[self._client.get(stream_id, ClientStream.UNOPENED)].get(kind)
            assert after is not None, f"{received} of a stream that is {self._client.get(stream_id)}"
            assert self._client[stream_id] is not ClientStream.CLOSED, f"{received} after the end"
            self._client[stream_id] = after
            self._spend(kind, stream_id, received)
        else:
            before = self._server.get(stream_id, ServerStream.UNOPENED)
            streams = kind in (frame.OPEN, frame.OPEN_RAW) and received[3] & frame.FLAG_REQUEST_STREAM
            name = -frame.OPEN if streams else frame.OPEN if kind == frame.OPEN_RAW else kind
            name = -frame.CANCEL if kind == frame.CANCEL and received[2] == frame.Strength.KILL else name
            assert name in SERVER_STEPS[before], f"{received} of a stream that is {before!r}"
            assert before is not ServerStream.CLOSED, f"{received} after the end"
            self._server[stream_id] = SERVER_STEPS[before][name]
            self._spend(kind, stream_id, received)

    def _spend(self, kind: int, stream_id: int, received: list[Any]) -> None:
        costs = [1] * len(received[2]) if kind in _BATCHES else [1] if kind in _ITEMS else []
        if kind in (frame.DATA_RAW, frame.LAST_RAW):
            costs = [frame.raw_cost(received[2])]
        left = self._credit.get(stream_id, WINDOW)
        for cost in costs:
            assert left > 0, f"{received} without credit"
            left -= cost
        self._credit[stream_id] = left
