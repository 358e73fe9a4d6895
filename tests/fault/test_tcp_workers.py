"""The tcp plane against workers that die, freeze and come back, as processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import (
    AuthenticationFailed,
    CannotConnect,
    ConnectionLost,
    NotAccepted,
    PeerSilent,
    PlaneError,
)
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.connection import SILENT_S
from dynamo_redis.planes.tcp.client import TcpClient
from tests.processes import PROGRAMS
from tests.tcp_plane import SECRET


class Worker:
    """A worker process."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, secret: bytes) -> None:
        self.process = process
        self.address = address
        self.secret = secret

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    def target(self, subject: str) -> Target:
        return Target(1, self.address, subject, self.secret)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@asynccontextmanager
async def worker(secret: bytes = SECRET, port: int = 0) -> AsyncIterator[Worker]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROGRAMS / "tcp_worker.py"),
        secret.hex(),
        str(port),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        yield Worker(process, line.decode().strip(), secret)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.fixture
async def client() -> AsyncIterator[TcpClient]:
    made = TcpClient(PlaneSettings())
    yield made
    await made.aclose()


async def broken(client: TcpClient, target: Target, request: Any = None) -> tuple[int, PlaneError]:
    """Return the count of items before the stream broke, and its error."""
    count = 0
    try:
        async for _ in client.open(target, request, Context()):
            count += 1
    except PlaneError as exc:
        return count, exc
    raise AssertionError("the stream ended as if nothing had happened")


async def test_killed_in_the_middle_of_an_answer(client: TcpClient) -> None:
    async with worker() as made:
        readers = [asyncio.ensure_future(broken(client, made.target("tick"), 100)) for _ in range(20)]
        readers.append(asyncio.ensure_future(broken(client, made.target("quiet"))))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        made.signal(signal.SIGKILL)
        for count, error in await asyncio.gather(*readers[:-1]):
            assert count > 0
            assert isinstance(error, ConnectionLost)
        assert isinstance((await readers[-1])[1], ConnectionLost)
        assert time.monotonic() - began < 8
        _, error = await broken(client, made.target("tick"), 100)
        assert isinstance(error, CannotConnect)
        assert client.pending_count == client.connection_count == 0


async def test_killed_in_the_middle_of_a_large_payload(client: TcpClient) -> None:
    async with worker() as made:
        assert [item async for item in client.open(made.target("echo"), 1, Context())] == [1]
        reader = asyncio.ensure_future(broken(client, made.target("tick"), 30 << 20))
        await asyncio.sleep(0.3)
        made.signal(signal.SIGKILL)
        _, error = await asyncio.wait_for(reader, 30)
        assert isinstance(error, ConnectionLost)


@pytest.mark.parametrize("subject", ["tick", "quiet"])
async def test_frozen_worker_is_given_up_after_five_seconds(client: TcpClient, subject: str) -> None:
    async with worker() as made:
        reader = asyncio.ensure_future(broken(client, made.target(subject), 100))
        await asyncio.sleep(0.3)
        made.signal(signal.SIGSTOP)
        began = time.monotonic()
        _, error = await asyncio.wait_for(reader, 60)
        assert isinstance(error, PeerSilent)
        assert time.monotonic() - began > SILENT_S
        made.signal(signal.SIGCONT)


async def test_blocked_worker_keeps_its_streams(client: TcpClient) -> None:
    """Its event loop hangs for longer than a stopped process may: a thread answers for it."""
    async with worker() as made:
        ticks = client.open(made.target("tick"), 100, Context())
        assert await anext(ticks) == b"x" * 100
        began = time.monotonic()
        blocked = client.open(made.target("block"), SILENT_S + 3, Context())
        assert await asyncio.wait_for(anext(blocked), 60) == "done"
        assert time.monotonic() - began > SILENT_S
        for _ in range(200):
            assert await asyncio.wait_for(anext(ticks), 10) == b"x" * 100
        await ticks.aclose()


async def test_probe_tells_a_blocked_worker_from_a_stopped_one(client: TcpClient) -> None:
    async with worker() as made:
        await client.probe(made.target("echo"), 5)
        blocked = client.open(made.target("block"), 4, Context())
        await asyncio.sleep(0.3)
        with pytest.raises(NotAccepted):
            await client.probe(made.target("echo"), 2)
        assert await asyncio.wait_for(anext(blocked), 60) == "done"
        await client.probe(made.target("echo"), 10)
        made.signal(signal.SIGSTOP)
        with pytest.raises(CannotConnect):
            await client.probe(made.target("echo"), 2)
        made.signal(signal.SIGCONT)


async def test_frozen_idle_worker_is_found_by_the_connect_timeout() -> None:
    client = TcpClient(PlaneSettings.load(connect_timeout_s=0.5))
    async with worker() as made:
        made.signal(signal.SIGSTOP)
        began = time.monotonic()
        _, error = await broken(client, made.target("echo"))
        assert isinstance(error, CannotConnect)
        with pytest.raises(CannotConnect):
            await client.probe(made.target("echo"), 0.3)
        assert time.monotonic() - began < 8
    await client.aclose()


async def test_restarted_on_its_port_with_a_new_secret(client: TcpClient) -> None:
    async with worker() as first:
        assert [item async for item in client.open(first.target("echo"), 1, Context())] == [1]
        first.signal(signal.SIGKILL)
        await first.process.wait()
        async with worker(b"another" * 5, first.port) as second:
            _, error = await broken(client, first.target("echo"))
            assert isinstance(error, AuthenticationFailed)
            assert [item async for item in client.open(second.target("echo"), 2, Context())] == [2]


async def test_paused_caller_keeps_its_streams(client: TcpClient) -> None:
    async with worker() as made:
        stream = client.open(made.target("tick"), 100, Context())
        for pause_s in (1.2, 2.5):
            await anext(stream)
            time.sleep(pause_s)
        for _ in range(200):
            assert await asyncio.wait_for(anext(stream), 10) == b"x" * 100
        await stream.aclose()


async def test_frozen_caller_costs_its_worker_nothing_for_long(client: TcpClient) -> None:
    """A worker gives up a caller that stops reading, here by a hanging event loop."""
    async with worker() as made:
        stream = client.open(made.target("tick"), 100_000, Context())
        await anext(stream)
        await asyncio.sleep(0)
        time.sleep(9)
        with pytest.raises(ConnectionLost):
            [item async for item in stream]
        assert [item async for item in client.open(made.target("echo"), 1, Context())] == [1]
