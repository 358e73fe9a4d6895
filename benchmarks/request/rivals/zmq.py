"""pyzmq: a DEALER that numbers its requests, a ROUTER that answers them."""

from __future__ import annotations

import asyncio
from itertools import count as counting
from typing import Any, Final

import zmq
import zmq.asyncio

from benchmarks.request.rivals.peer import STREAMS, Announce, Peer
from benchmarks.request.workloads import Kind

LARGE_BYTES: Final = 1 << 16
"""Size from which a frame is handed over without a copy."""


def _socket(kind: int) -> Any:
    """Return a socket without a limit of queued messages: at its limit, a ROUTER would drop them."""
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket


async def serve(announce: Announce) -> None:
    """Answer `[caller, id, kind, argument]` by `[caller, id, item]` for each item, and `[caller, id]` at a
    stream's end."""
    socket = _socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    announce(f"tcp://127.0.0.1:{port}")
    running: set[asyncio.Task[None]] = set()

    async def answer(caller: bytes, number: bytes, kind: Kind, count: int) -> None:
        async for item in STREAMS[kind](count):
            await socket.send_multipart((caller, number, item))
        await socket.send_multipart((caller, number))

    while True:
        caller, number, kind, argument = await socket.recv_multipart()
        if kind == b"echo":
            await socket.send_multipart((caller, number, argument), copy=len(argument) < LARGE_BYTES)
        else:
            task = asyncio.create_task(answer(caller, number, kind.decode(), int(argument)))
            running.add(task)
            task.add_done_callback(running.discard)


class ZmqPeer(Peer):
    """One DEALER; a task distributes the answers."""

    def __init__(self, address: str) -> None:
        self._socket = _socket(zmq.DEALER)
        self._socket.connect(address)
        self._numbers = counting()
        self._answers: dict[bytes, asyncio.Future[bytes]] = {}
        self._streams: dict[bytes, asyncio.Queue[bytes | None]] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            number, *item = await self._socket.recv_multipart()
            if (answer := self._answers.pop(number, None)) is not None:
                answer.set_result(item[0])
            else:
                self._streams[number].put_nowait(item[0] if item else None)

    async def echo(self, payload: bytes) -> Any:
        number = b"%d" % next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send_multipart((number, b"echo", payload), copy=len(payload) < LARGE_BYTES)
        return await answer

    async def stream(self, kind: Kind, count: int) -> int:
        number, seen = b"%d" % next(self._numbers), 0
        items: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._streams[number] = items
        await self._socket.send_multipart((number, kind.encode(), b"%d" % count))
        while await items.get() is not None:
            seen += 1
        del self._streams[number]
        return seen


async def connect(address: str) -> ZmqPeer:
    """Make the peer; the library connects in a thread of its own."""
    return ZmqPeer(address)
