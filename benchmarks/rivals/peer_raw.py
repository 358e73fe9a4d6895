"""A bare uvloop echo: no frames, no tasks; a connection for each request that is under way. The floor."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from benchmarks.request_workloads import Kind, Workload
from benchmarks.rivals.peer import Announce, Peer


class Echo(asyncio.Protocol):
    """Sends back what comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Caller(asyncio.Protocol):
    """Sends the next request as soon as the last one's answer has come whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def begin(self, payload: bytes, until: float, latencies: list[float]) -> asyncio.Future[None]:
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
    """Echo."""
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    announce(f"{host}:{port}")
    await asyncio.Event().wait()


class RawPeer(Peer):
    """Connections, as many as a workload wants; they stay for the next one."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.partition(":")
        self._callers: list[Caller] = []

    async def drive(self, workload: Workload, seconds: float) -> list[float]:
        loop = asyncio.get_running_loop()
        while len(self._callers) < workload.concurrency:
            _, caller = await loop.create_connection(Caller, self._host, int(self._port))
            self._callers.append(caller)
        latencies: list[float] = []
        until = time.perf_counter() + seconds
        payload = self.payload(workload.size_bytes)
        callers = self._callers[: workload.concurrency]
        await asyncio.gather(*(caller.begin(payload, until, latencies) for caller in callers))
        return latencies

    async def echo(self, payload: bytes) -> Any:
        raise NotImplementedError("`drive` puts the load on without it")

    async def stream(self, kind: Kind, count: int) -> int:
        raise NotImplementedError("there are no frames, so there are no items")


async def connect(address: str) -> RawPeer:
    """The first load connects."""
    return RawPeer(address)
