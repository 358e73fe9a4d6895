"""A worker whose event loop is busy gives signs of life by a thread, in the clear and under TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.life_signs import ask_for_life
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire.handshake import ClientHandshake, is_life_answer, life_question
from tests.certificates import Authority
from tests.tcp_plane import INSTANCE, SECRET

NONCE = bytes(32)
R = TypeVar("R")


@asynccontextmanager
async def running(
    tls: bool, tmp_path: Path, *, loop_stall_s: float = 0.0
) -> AsyncIterator[tuple[TcpServer, PlaneSettings]]:
    chosen: dict[str, Any] = {}
    if tls:
        authority = Authority(tmp_path)
        chosen = authority.settings(authority.issue("127.0.0.1"))
    settings = PlaneSettings.load(tcp_host="127.0.0.1", **chosen)
    server = TcpServer(settings, secret=SECRET, instance_id=INSTANCE, loop_stall_s=loop_stall_s)
    await server.start()
    try:
        yield server, settings
    finally:
        await server.aclose()


def while_the_loop_is_busy(act: Callable[[], R]) -> R:
    """Let another thread act, and hold the event loop until it is done."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(120)


def exchange(server: TcpServer, data: bytes, timeout_s: float = 60) -> bytes:
    host, port = server.address.partition("+")[0].rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=timeout_s) as sock:
        sock.sendall(data)
        return sock.recv(2048)


async def answered(server: TcpServer) -> bool:
    with suppress(ConnectionError):
        return await ask_for_life(server.address, SECRET, INSTANCE)
    return False


@pytest.mark.parametrize("tls", [False, True])
async def test_busy_worker_gives_signs_of_life(tls: bool, tmp_path: Path) -> None:
    async with running(tls, tmp_path) as (server, _):
        for _ in range(3):
            answer = while_the_loop_is_busy(lambda: exchange(server, life_question(INSTANCE, NONCE)))
            assert is_life_answer(answer, SECRET, INSTANCE, NONCE)


@pytest.mark.parametrize("tls", [False, True])
async def test_responsive_worker_closes_the_question(
    tls: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tls, tmp_path) as (server, _):
        async with asyncio.timeout(60):
            while await answered(server):  # the loop was late, and its thread was not
                pass
        assert not caplog.records


async def test_connection_made_meanwhile_is_served_afterwards(tmp_path: Path) -> None:
    async with running(False, tmp_path) as (server, settings):
        host, port = server.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=60) as caller:
            caller.sendall(ClientHandshake(SECRET, 10, INSTANCE).first_message())
            answer = while_the_loop_is_busy(lambda: exchange(server, life_question(INSTANCE, NONCE)))
            assert is_life_answer(answer, SECRET, INSTANCE, NONCE)
            caller.setblocking(False)
            async with asyncio.timeout(60):
                assert len(await asyncio.get_running_loop().sock_recv(caller, 1024)) > 32
        client = TcpClient(settings)
        await client.probe(Target(INSTANCE, server.address, "any", SECRET), 30)
        await client.aclose()


def ask_until_silent(server: TcpServer) -> None:
    """Ask once, and again until there is no answer within 2 s."""
    question = life_question(INSTANCE, NONCE)
    assert is_life_answer(exchange(server, question), SECRET, INSTANCE, NONCE)
    deadline = time.monotonic() + 60
    with suppress(TimeoutError):
        while time.monotonic() < deadline:
            exchange(server, question, timeout_s=2)
    assert time.monotonic() < deadline


async def test_worker_that_hangs_for_good_stops_answering(tmp_path: Path) -> None:
    async with running(False, tmp_path, loop_stall_s=1.0) as (server, _):
        for _ in range(2):  # the second time: a loop that came back is spoken for again
            while_the_loop_is_busy(lambda: ask_until_silent(server))
            await until_it_runs(server)


async def until_it_runs(server: TcpServer) -> None:
    """Wait until the event loop has the connections that the thread accepted."""
    async with asyncio.timeout(60):
        while await answered(server) or server.connection_count:
            await asyncio.sleep(0.01)


async def test_silent_callers_do_not_keep_the_thread_from_answering(tmp_path: Path) -> None:
    async with running(False, tmp_path) as (server, _):
        assert while_the_loop_is_busy(lambda: answered_beside(server, silent_count=300))


def answered_beside(server: TcpServer, silent_count: int) -> bool:
    """Return whether a question is answered while `silent_count` callers send nothing."""
    host, port = server.address.rsplit(":", 1)
    with ExitStack() as silent:
        for _ in range(silent_count):
            silent.enter_context(socket.create_connection((host, int(port)), timeout=60))
        return is_life_answer(exchange(server, life_question(INSTANCE, NONCE)), SECRET, INSTANCE, NONCE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_thread_ends_although_a_forked_child_lives(tmp_path: Path) -> None:
    async with running(False, tmp_path) as (server, _):
        assert server._life is not None
        blocked, unblock = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(unblock)
            os.read(blocked, 1)
            os._exit(0)
        try:
            await server.aclose()
            assert not server._life._thread.is_alive()
        finally:
            os.close(unblock)
            os.close(blocked)
            os.waitpid(child, 0)


async def test_thread_outlives_a_loop_that_wakes_at_once(tmp_path: Path) -> None:
    """The event loop may note its turn between any two steps of the thread."""
    async with running(False, tmp_path, loop_stall_s=60) as (server, _):
        life = server._life
        assert life is not None

        def runs_at_once(callback: Callable[..., None], *args: Any, **_: Any) -> None:
            callback(*args)

        loop, life._loop = life._loop, SimpleNamespace(call_soon_threadsafe=runs_at_once)  # type: ignore[assignment]
        answer = while_the_loop_is_busy(lambda: exchange(server, life_question(INSTANCE, NONCE)))
        life._loop = loop
        assert is_life_answer(answer, SECRET, INSTANCE, NONCE)
        assert life._thread.is_alive()
