"""A bare uvloop echo, the floor: no frames, no tasks, and a connection for each request that is under way.

The caller awaits a future an echo. With the argument `callback` it sends the next request from within the
callback that brings the answer, which no program does that works on its answers.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from benchmarks.request.rivals.peer import Announce, Peer
from benchmarks.request.workloads import Kind, Workload


class Echo(asyncio.Protocol):
    """Sends back the bytes that come."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Caller(asyncio.Protocol):
    """Has one request under way at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._loop = asyncio.get_running_loop()

    def ask(self, payload: bytes) -> asyncio.Future[bytes]:
        """Send a payload; the future is done when as many bytes have come back."""
        self._size, self._answer = len(payload), b""
        self._future: asyncio.Future[bytes] = self._loop.create_future()
        self._transport.write(payload)
        return self._future

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if len(self._answer) == self._size:
            self._future.set_result(self._answer)


class RestlessCaller(asyncio.Protocol):
    """Sends the next request as soon as the last answer is complete."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def start(self, payload: bytes, until: float, latencies: list[float]) -> asyncio.Future[None]:
        """Call until that time; the future is done after the last answer."""
        self._payload, self._until, self._latencies = payload, until, latencies
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask()
        return self._done

    def _ask(self) -> None:
        self._missing = len(self._payload)
        self._began = time.perf_counter()
        self._transport.write(self._payload)

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing:
            return
        now = time.perf_counter()
        self._latencies.append(now - self._began)
        if now < self._until:
            self._ask()
        else:
            self._done.set_result(None)


async def serve(announce: Announce) -> None:
    """Serve echoes."""
    made: list[Echo] = []

    def echo() -> Echo:
        made.append(Echo())
        return made[-1]

    server = await asyncio.get_running_loop().create_server(echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        announce(f"{host}:{port}")
        await asyncio.Event().wait()
    finally:
        server.close()
        for connection in made:
            connection.close()


class RawPeer(Peer):
    """Connections, as many as there are requests at once, kept for the next ones."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.partition(":")
        self._free: list[Caller] = []

    async def echo(self, payload: bytes) -> bytes:
        if self._free:
            caller = self._free.pop()
        else:
            loop = asyncio.get_running_loop()
            _, caller = await loop.create_connection(Caller, self._host, int(self._port))
        answer = await caller.ask(payload)
        self._free.append(caller)
        return answer

    async def stream(self, kind: Kind, count: int) -> int:
        raise NotImplementedError("there are no frames, so there are no items")

    async def aclose(self) -> None:
        for caller in self._free:
            caller.close()


class RestlessPeer(RawPeer):
    """The same without a task that awaits each answer."""

    async def drive(self, workload: Workload, seconds: float) -> list[float]:
        loop, payload = asyncio.get_running_loop(), self.payload(workload.size_bytes)
        made: list[Any] = [
            await loop.create_connection(RestlessCaller, self._host, int(self._port))
            for _ in range(workload.concurrency)
        ]
        latencies: list[float] = []
        until = time.perf_counter() + seconds
        await asyncio.gather(*(caller.start(payload, until, latencies) for _, caller in made))
        for transport, _ in made:
            transport.close()
        return latencies


async def connect(address: str, how: str = "await") -> RawPeer:
    """Make the peer; the first load connects."""
    return RestlessPeer(address) if how == "callback" else RawPeer(address)
