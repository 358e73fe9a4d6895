"""The connections of the tcp plane: the choice for a request, failed dials, storms, floods, limits."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, DeadlineExceeded, Overloaded, PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames import client_connection
from dynamo_redis.planes.frames import pool as tcp_pool
from dynamo_redis.planes.tcp import dial as tcp_dialing
from dynamo_redis.planes.tcp import listener as tcp_listener
from dynamo_redis.planes.tcp import server as tcp_server
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.listener import SocketListener
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire.handshake import ClientHandshake, ServerHandshake
from tests.processes import PROGRAMS
from tests.tcp_plane import INSTANCE, SECRET, both_loops, eventually, running_client, running_server

MIB = 1 << 20


@asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
) -> AsyncIterator[int]:
    """Listen with `handle`; yield the port."""
    tasks: set[asyncio.Task[Any]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(tracked, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """Accept a connection, and send nothing."""
    await reader.read()
    await asyncio.sleep(60)


def at(port: int, subject: str = "small") -> Target:
    return Target(INSTANCE, f"127.0.0.1:{port}", subject, SECRET)


def target_of(server: TcpServer, subject: str = "small") -> Target:
    return Target(INSTANCE, server.address, subject, SECRET)


def port_of(server: TcpServer) -> int:
    return int(server.address.rpartition(":")[2])


async def call(client: TcpClient, target: Target, request: Any = 1, context: Context | None = None) -> Any:
    stream = client.open(target, request, context or Context())
    try:
        return await anext(stream)
    finally:
        await stream.aclose()


async def error_of(client: TcpClient, target: Target, request: Any = 1) -> PlaneError | None:
    try:
        await call(client, target, request)
    except PlaneError as exc:
        return exc
    return None


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the limit of open files as far as the system allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --------------------------------------------------------------------------- which connection


async def test_small_requests_share_one_connection() -> None:
    async with running_server() as server, running_client() as client:
        target = target_of(server)
        await asyncio.gather(*(call(client, target, number) for number in range(300)))
        assert client.connection_count == 1
        assert server.connection_count == 1


def _note(ended: list[int], number: int, _: object) -> None:
    ended.append(number)


async def order_of_ends(*calls: asyncio.Task[Any]) -> list[int]:
    ended: list[int] = []
    for number, one in enumerate(calls):
        one.add_done_callback(partial(_note, ended, number))
    await asyncio.gather(*calls)
    await asyncio.sleep(0)
    return ended


@pytest.mark.parametrize(("subject", "request_"), [("echo", bytes(24 * MIB)), ("large", 24 * MIB)])
async def test_small_request_does_not_wait_for_a_large_one(subject: str, request_: Any) -> None:
    async with running_server() as server, running_client() as client:
        small, large = target_of(server), target_of(server, subject)
        await call(client, small)
        for _ in range(2):  # the first shows what is large, and gives it a connection
            await call(client, large, request_)
        await eventually(lambda: client.connection_count == 2)
        for _ in range(3):
            ended = await order_of_ends(
                asyncio.ensure_future(call(client, large, request_)),
                asyncio.ensure_future(call(client, small)),
            )
            assert ended == [1, 0]
        assert client.connection_count == 2


async def test_full_socket_gets_another_connection_beside_it() -> None:
    async with running_server() as server, running_client(pool_size=3) as client:
        small, large = target_of(server), target_of(server, "echo")
        await call(client, small)
        under_way = [asyncio.ensure_future(call(client, large, bytes(16 * MIB))) for _ in range(6)]
        await asyncio.sleep(0)
        for _ in range(50):
            await call(client, small)
        assert 1 < client.connection_count <= 3
        assert [len(answer) for answer in await asyncio.gather(*under_way)] == [16 * MIB] * 6


async def test_pool_of_one_carries_everything() -> None:
    async with running_server() as server, running_client(pool_size=1) as client:
        await call(client, target_of(server))
        large = [call(client, target_of(server, "echo"), bytes(2 * MIB)) for _ in range(8)]
        small = [call(client, target_of(server)) for _ in range(50)]
        await asyncio.gather(*large, *small)
        assert client.connection_count == 1


async def test_unneeded_connections_close_under_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_server() as server, running_client(keepalive_interval_s=0.1) as client:
        small, large = target_of(server), target_of(server, "echo")
        await call(client, small)
        await call(client, large, bytes(4 * MIB))
        await eventually(lambda: client.connection_count == 2)
        monkeypatch.setattr(client_connection, "IDLE_CLOSE_S", 0.5)
        await call(client, large, bytes(4 * MIB))
        deadline = time.monotonic() + 10
        while client.connection_count > 1:
            assert time.monotonic() < deadline
            await call(client, small)
            await asyncio.sleep(0.002)
        for _ in range(50):  # the one that is in use stays
            await call(client, small)
            assert client.connection_count == 1


async def test_idle_connections_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_connection, "IDLE_CLOSE_S", 0.05)
    async with running_server() as server, running_client(keepalive_interval_s=0.1) as client:
        for begin in (call(client, target_of(server)), client.probe(target_of(server), 5)):
            await begin
            assert server.connection_count == 1
            await eventually(lambda: server.connection_count == 0 and client.connection_count == 0)
        assert repr(client) == "<TcpClient: 0 instances>"


# --------------------------------------------------------------------------- what waits


async def test_unsent_requests_are_bounded() -> None:
    async def shakes_hands_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handshake = ServerHandshake(SECRET, 100, INSTANCE)
        while not handshake.done:
            answer, _ = handshake.feed(memoryview(await reader.read(1024)))
            writer.write(answer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    async with (
        listening(shakes_hands_only) as port,
        running_client(pool_size=1, max_message_bytes=100_000) as client,
    ):
        opened = [client.open(at(port), bytes(60_000), Context())]
        await eventually(lambda: opened[0].sent)
        while client.pending_count == len(opened):
            assert len(opened) < 5000
            opened.append(client.open(at(port), bytes(60_000), Context()))
            await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await anext(opened[-1])


async def test_requests_that_wait_for_a_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_pool, "MAX_PARKED_COUNT", 10)
    async with (
        listening(silent) as port,
        running_client(connect_timeout_s=0.5, max_message_bytes=100_000) as client,
    ):
        for size, fit in ((10, 10), (90_000, 8)):  # as many as are counted, or as eight of the largest weigh
            errors = await asyncio.gather(*(error_of(client, at(port), bytes(size)) for _ in range(15)))
            assert [type(error) for error in errors] == [CannotConnect] * fit + [Overloaded] * (15 - fit)
        assert client.pending_count == 0


# --------------------------------------------------------------------------- failed dials


async def test_callers_of_a_dead_instance_pause_between_dials() -> None:
    dials = 0

    async def hangs_up(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        nonlocal dials
        dials += 1

    async with running_client() as client:
        async with listening(hangs_up) as port:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                assert isinstance(await error_of(client, at(port)), CannotConnect)
            assert dials < 60  # some 6; without pauses thousands
        async with running_server(tcp_port=port):
            assert await call(client, at(port)) == 1


def test_pauses_are_random_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(least: float, most: float) -> float:
        drawn.append((least, most))
        return least

    monkeypatch.setattr(random, "uniform", uniform)

    async def main() -> None:
        async with listening(silent) as port:
            pass
        async with running_client() as client:
            for _ in range(7):
                assert isinstance(await error_of(client, at(port)), CannotConnect)
            assert drawn == [(0, pause) for pause in (0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5)]
            async with running_server(tcp_port=port) as server:
                assert await call(client, at(port)) == 1
            await eventually(lambda: server.connection_count == 0 and client.connection_count == 0)
            assert isinstance(await error_of(client, at(port)), CannotConnect)
            assert drawn[-1] == (0, 0.05)  # a success is a new beginning

    asyncio.run(main())


async def test_probe_dials_in_the_pause_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_pool, "REDIAL_PAUSE_S", (60.0, 60.0))
    monkeypatch.setattr(random, "uniform", lambda _, most: most)
    async with listening(silent) as port:
        pass
    async with running_client(connect_timeout_s=120) as client:
        assert isinstance(await error_of(client, at(port)), CannotConnect)
        with pytest.raises(DeadlineExceeded):
            await call(client, at(port), context=Context(deadline=time.monotonic() + 0.05))
        async with running_server(tcp_port=port):
            waiting = asyncio.ensure_future(call(client, at(port)))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await client.probe(at(port), 10)
            assert await waiting == 1


async def test_client_that_is_closed_in_a_pause_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _, most: most)
    async with listening(silent) as port:
        pass
    client = TcpClient(PlaneSettings())
    assert isinstance(await error_of(client, at(port)), CannotConnect)
    waiting = asyncio.ensure_future(error_of(client, at(port)))
    await asyncio.sleep(0)
    assert client.pending_count == 1
    await client.aclose()
    assert isinstance(await waiting, PlaneError)
    assert repr(client) == "<TcpClient: 0 instances>"
    assert client.pending_count == 0


@both_loops
async def test_dial_that_reaches_itself_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may choose a free port of the ephemeral range for the caller's own end."""
    async with listening(silent) as port:
        pass

    def from_the_same_port(*_: Any) -> tuple[str, int, dict[str, Any]]:
        return "127.0.0.1", port, {"local_addr": ("127.0.0.1", port)}

    monkeypatch.setattr(tcp_dialing, "dial_options", from_the_same_port)
    async with running_client() as client:
        error = await error_of(client, at(port))
        assert isinstance(error, CannotConnect)
        assert "no process listens" in str(error)
    async with running_server(tcp_port=port):  # and the port is not in use
        pass


@both_loops
async def test_name_of_several_addresses() -> None:
    async with running_server() as server, running_client() as client:
        target = Target(INSTANCE, f"localhost:{port_of(server)}", "small", SECRET)
        assert await call(client, target) == 1


# --------------------------------------------------------------------------- sockets


@both_loops
async def test_sockets_have_nodelay_and_keepalive_on_both_sides() -> None:
    async with running_server() as server, running_client() as client:
        await call(client, target_of(server))
        (pool,) = client._pools.values()
        for connection in (*pool._connections, *server._connections):
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


@both_loops
async def test_idle_connections_cause_no_wakeups(many_files: None) -> None:
    patient = {"connect_timeout_s": 60}  # all dial at once
    async with running_server(**patient) as server:
        clients = [TcpClient(PlaneSettings.load(keepalive_interval_s=0.1, **patient)) for _ in range(300)]
        await asyncio.gather(*(call(client, target_of(server)) for client in clients))
        assert server.connection_count == len(clients)
        for _ in range(20):  # on a busy machine the last sweeps may take a while
            before = resource.getrusage(resource.RUSAGE_SELF)
            await asyncio.sleep(0.5)
            after = resource.getrusage(resource.RUSAGE_SELF)
            if after.ru_nvcsw - before.ru_nvcsw < 20:
                break
        else:
            pytest.fail("it did not come to rest")
        for client in clients:
            await client.aclose()


# --------------------------------------------------------------------------- the server's door


@both_loops
async def test_one_turn_accepts_few_connections() -> None:
    loop = asyncio.get_running_loop()
    came: list[socket.socket] = []
    listener = await SocketListener.open(loop, "127.0.0.1", 0, came.append)
    callers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(300)]
    steps = []
    while len(came) < len(callers):
        before = len(came)
        await asyncio.sleep(0)
        steps.append(len(came) - before)
    assert max(steps) < 100
    listener.close()
    for sock in (*came, *callers):
        sock.close()


@both_loops
async def test_listener_pauses_at_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_listener, "_NO_FILES", ())  # as if the file in reserve did not help
    attempts = 0
    accept = SocketListener._accept

    def counted(self: SocketListener, listening: socket.socket) -> None:
        nonlocal attempts
        attempts += 1
        accept(self, listening)

    monkeypatch.setattr(SocketListener, "_accept", counted)
    loop = asyncio.get_running_loop()
    came: list[socket.socket] = []
    listener = await SocketListener.open(loop, "127.0.0.1", 0, came.append)
    callers = [socket.socket() for _ in range(3)]
    os.close(first_free := os.dup(0))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, before[1]))
    try:
        for sock in callers:
            sock.connect(("127.0.0.1", listener.port))
        await asyncio.sleep(0.3)
        assert 1 <= attempts < 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not came
    await eventually(lambda: len(came) == 3)
    listener.close()
    for sock in (*came, *callers):
        sock.close()


@asynccontextmanager
async def crowd(port: int) -> AsyncIterator[list[socket.socket]]:
    """Open connections that never finish their handshake, half of them after the HELLO."""
    loop = asyncio.get_running_loop()
    crowd: list[socket.socket] = []

    async def crowd_in() -> None:
        while True:
            sock = socket.socket()
            sock.setblocking(False)
            crowd.append(sock)
            await loop.sock_connect(sock, ("127.0.0.1", port))
            if len(crowd) % 2:
                await loop.sock_sendall(sock, ClientHandshake(SECRET, 100, INSTANCE).first_message())
            await asyncio.sleep(0.001)

    crowding = asyncio.ensure_future(crowd_in())
    try:
        yield crowd
    finally:
        crowding.cancel()
        await asyncio.wait([crowding])
        for sock in crowd:
            sock.close()


async def test_unfinished_handshakes_leave_room_for_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_server, "MAX_HANDSHAKE_COUNT", 40)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            running_server(max_connections_count=200, connect_timeout_s=60)
        )
        crowded = await stack.enter_async_context(crowd(port_of(server)))
        await eventually(lambda: len(crowded) > 60)
        clients = [await stack.enter_async_context(running_client()) for _ in range(8)]
        for client in clients:
            assert await call(client, target_of(server)) == 1
        await eventually(lambda: len(crowded) > 150)
        for client in clients:  # and who is in stays in
            assert await call(client, target_of(server)) == 1
            assert client.connection_count == 1
        assert server.connection_count <= 40 + len(clients)


async def test_server_full_of_callers_refuses_another() -> None:
    async with running_server(max_connections_count=3) as server, running_client() as client:
        inside = [TcpClient(PlaneSettings()) for _ in range(3)]
        for one in inside:
            assert await call(one, target_of(server)) == 1
        assert isinstance(await error_of(client, target_of(server)), Overloaded)
        await inside.pop().aclose()
        await eventually(lambda: server.connection_count == 2)
        assert await call(client, target_of(server)) == 1
        for one in inside:
            await one.aclose()


# --------------------------------------------------------------------------- many at once


@asynccontextmanager
async def program(name: str, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program of `tests/programs`. It gets the line `stop` at the end, and is killed if it does not
    end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROGRAMS / name),
        *map(str, arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
        assert process.stdin is not None
        with suppress(ConnectionError):
            await say(process, "stop")
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def say(process: asyncio.subprocess.Process, word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n".encode())
    await process.stdin.drain()


async def heard(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    return json.loads(await asyncio.wait_for(process.stdout.readline(), 60))


async def test_thousand_clients_connect_and_reconnect_at_once(many_files: None) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server())
        processes = [
            await stack.enter_async_context(program("tcp_storm.py", server.address, 250)) for _ in range(4)
        ]
        for process in processes:
            assert await heard(process) == "ready"
        for process in processes:
            await say(process, "once")
        assert [await heard(process) for process in processes] == [{"1": 250}] * 4
        assert server.connection_count == 1000
        await server.aclose()
        for process in processes:
            await say(process, "until answered")
        await asyncio.sleep(0.3)
        second = await stack.enter_async_context(running_server(tcp_port=port_of(server)))
        assert [await heard(process) for process in processes] == [{"1": 250}] * 4
        assert second.connection_count == 1000


async def test_backlog_that_overflows_costs_time_but_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_listener, "BACKLOG", 16)  # as a small net.core.somaxconn does
    async with running_server() as server, program("tcp_storm.py", server.address, 100) as process:
        assert await heard(process) == "ready"
        await say(process, "until answered")
        time.sleep(0.3)  # the storm comes while the server looks elsewhere
        assert await heard(process) == {"1": 100}


def resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_ten_thousand_connections_dropped_at_every_stage() -> None:
    async with running_server() as server, running_client() as client:
        target = target_of(server)

        async def behave(flood: asyncio.Future[Any]) -> int:
            count = 0
            while not flood.done():
                assert await call(client, target, count) == count
                count += 1
                await asyncio.sleep(0.001)
            return count

        resident = []
        for size in (1000, 9000):  # the first lot brings in what stays
            async with program("tcp_flood.py", port_of(server), size) as process:
                flood = asyncio.ensure_future(heard(process))
                assert await behave(flood) > 10
                assert await flood == "done"
            await eventually(lambda: server.connection_count == 1 and server.in_flight_count == 0)
            resident.append(resident_kib())
        assert resident[1] - resident[0] < 4096
        assert client.connection_count == 1
        assert not server._in_handshake
        assert not server._arriving


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_process_at_its_limit_of_open_files_refuses_callers(loop: str) -> None:
    async with program("tcp_file_limit.py", loop) as process, AsyncExitStack() as stack:
        address, (code, message) = await heard(process)
        assert code == "cannot_connect"
        assert "RLIMIT_NOFILE is 128" in message
        target = Target(INSTANCE, address, "small", SECRET)

        async def clients(count: int) -> list[TcpClient]:
            return [await stack.enter_async_context(running_client()) for _ in range(count)]

        inside = await clients(10)
        for client in inside:
            assert await call(client, target) == 1
        outside = await clients(60)
        errors = await asyncio.gather(*(error_of(client, target) for client in outside))
        refused = [error for error in errors if error is not None]
        assert len(refused) >= 45
        assert {type(error) for error in refused} == {Overloaded}
        await say(process, "cpu")
        cpu_s = await heard(process)
        await asyncio.sleep(0.5)
        for client in inside:  # those who are in notice nothing
            assert await call(client, target) == 1
        await say(process, "cpu")
        assert await heard(process) - cpu_s < 0.25  # it does not spin
        for client in outside:
            await client.aclose()
        (late,) = await clients(1)
        deadline = time.monotonic() + 10
        while (error := await error_of(late, target)) is not None:  # files are free again
            assert isinstance(error, Overloaded)
            assert time.monotonic() < deadline
