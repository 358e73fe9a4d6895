"""The tcp plane over TLS: accepted and refused peers, error texts, new certificates, slow handshakes.

The whole contract suite runs over mutual TLS as well (`tests/contract/test_request_plane.py`).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.errors import AuthenticationFailed, CannotConnect, Overloaded, PlaneError
from dynamo_redis.planes import reloaded
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.server_connection import ServerConnection
from dynamo_redis.planes.tcp import tls_gate
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack, unpack
from dynamo_redis.wire.handshake import ClientHandshake
from faults.proxy import GOOD, STALL, Proxy
from tests import tcp_plane
from tests.certificates import Authority, Identity
from tests.tcp_plane import INSTANCE, SECRET, eventually


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Both event loops: each has its own TLS."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def always_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed files are seen by the next connection."""
    monkeypatch.setattr(reloaded, "LOOK_S", 0.0)


def running_server(chosen: dict[str, Any]) -> AbstractAsyncContextManager[TcpServer]:
    return tcp_plane.running_server(**chosen)


def running_client(chosen: dict[str, Any]) -> AbstractAsyncContextManager[TcpClient]:
    return tcp_plane.running_client(**{"connect_timeout_s": 30, **chosen})


def target(server: TcpServer, subject: str = "echo", *, mark: str | None = None) -> Target:
    """Return an endpoint of the server; `mark` replaces the TLS mark of its address."""
    address = server.address if mark is None else server.address.partition("+")[0] + mark
    return Target(INSTANCE, address, subject, SECRET)


async def ask(client: TcpClient, where: Target, request: Any = 1) -> Any:
    [answer] = [item async for item in client.open(where, request, Context())]
    return answer


async def refusal(client: TcpClient, where: Target, kind: type[PlaneError], message: str) -> None:
    """Check that a request soon fails with this retryable error."""
    began = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        await ask(client, where)
    assert caught.value.retryable
    assert time.monotonic() - began < 15, "a time-out, and not an answer"
    assert client.connection_count == 0


def host_and_port(server: TcpServer) -> tuple[str, int]:
    host, _, port = server.address.partition("+")[0].rpartition(":")
    return host, int(port)


def certificate(identity: Identity) -> bytes:
    return ssl.PEM_cert_to_DER_cert(identity.cert.read_text())


async def shown_certificate(server: TcpServer, authority: Authority) -> bytes:
    """Return the certificate that the server shows to a new connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=authority.path)
    _, writer = await asyncio.open_connection(*host_and_port(server), ssl=context)
    try:
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        assert type(found) is bytes
        return found
    finally:
        writer.transport.abort()


# --------------------------------------------------------------------------- requests


@pytest.mark.parametrize("mode", ["on", "mutual"])
async def test_requests_and_large_payloads_both_ways(authority: Authority, mode: str) -> None:
    chosen = authority.settings(authority.issue(), mode)
    async with running_server(chosen) as server, running_client(chosen) as client:
        assert server.address.endswith({"on": "+tls", "mutual": "+mtls"}[mode])
        large = bytes(range(256)) * 4096 + b"tail"
        assert await ask(client, target(server), large) == large
        assert await asyncio.gather(*(ask(client, target(server), n) for n in range(100))) == list(range(100))
        assert client.connection_count == 1
        async with client.open(target(server, "count"), 500, Context()) as stream:
            assert [await anext(stream) for _ in range(500)] == list(range(500))
        await eventually(lambda: server.in_flight_count == 0)


async def test_caller_without_a_certificate_where_workers_do_not_ask(authority: Authority) -> None:
    async with (
        running_server(authority.settings(authority.issue())) as server,
        running_client(authority.settings()) as client,
    ):
        assert await ask(client, target(server), "hi") == "hi"


async def test_kernel_looks_after_connections_over_tls_too(authority: Authority) -> None:
    chosen = authority.settings(authority.issue())
    async with running_server(chosen) as server, running_client(chosen) as client:
        await ask(client, target(server))
        [connection] = server._connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_drain_over_tls_lets_the_answer_finish(authority: Authority) -> None:
    chosen = authority.settings(authority.issue(), "mutual")
    async with running_server(chosen) as server, running_client(chosen) as client:
        may_end = asyncio.Event()

        async def held(request: int, _: Context) -> AsyncIterator[int]:
            for number in range(request):
                yield number
                await may_end.wait()

        server.register("held", held)
        stream = client.open(target(server, "held"), 3, Context())
        assert await anext(stream) == 0
        draining = asyncio.create_task(server.drain(5))
        await asyncio.sleep(0.02)
        may_end.set()
        assert [item async for item in stream] == [1, 2]
        await draining
        await eventually(lambda: client.connection_count == 0)


# --------------------------------------------------------------------------- who is not let in


async def test_worker_of_another_authority(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with (
        running_server(stranger.settings(stranger.issue())) as server,
        running_client(authority.settings()) as client,
    ):
        await refusal(
            client, target(server), CannotConnect, "is not signed by an authority in DYN_TCP_TLS_CA"
        )


async def test_worker_whose_certificate_is_for_another_address(authority: Authority) -> None:
    async with running_server(authority.settings(authority.issue("10.1.1.1", "worker.example"))) as server:
        async with running_client(authority.settings()) as client:
            await refusal(client, target(server), CannotConnect, "does not name the address that was dialled")
        for name, is_right in (("worker.example", True), ("frontend.example", False)):
            async with running_client(authority.settings() | {"tcp_tls_server_name": name}) as client:
                if is_right:
                    assert await ask(client, target(server), "hi") == "hi"
                else:
                    await refusal(client, target(server), CannotConnect, "does not name the host")


async def test_worker_whose_certificate_has_expired(authority: Authority) -> None:
    """Its certificate was valid when the worker started."""
    old = authority.issue(is_expired=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(old.cert, old.key)
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    async with server, running_client(authority.settings()) as client:
        port = server.sockets[0].getsockname()[1]
        where = Target(INSTANCE, f"127.0.0.1:{port}+tls", "echo", SECRET)
        await refusal(client, where, CannotConnect, "certificate is refused: certificate has expired")


@pytest.mark.parametrize("presents", ["nothing", "another authority's", "expired", "a worker's TLS 1.2"])
async def test_caller_is_refused(
    authority: Authority, tmp_path: Path, presents: str, caplog: pytest.LogCaptureFixture
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=authority.path)
    if presents != "nothing":
        issuer = Authority(tmp_path, "stranger") if presents == "another authority's" else authority
        shown = issuer.issue(is_expired=presents == "expired")
        context.load_cert_chain(shown.cert, shown.key)
    if presents == "a worker's TLS 1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with running_server(authority.settings(authority.issue(), "mutual")) as server:
        answered = b""
        try:
            reader, writer = await asyncio.open_connection(*host_and_port(server), ssl=context)
            writer.write(ClientHandshake(SECRET, 10, INSTANCE).first_message())
            answered = await reader.read()
            writer.transport.abort()
        except OSError:
            pass
        assert answered == b""
        await eventually(lambda: server.connection_count == 0)
    expected = {
        "nothing": "the other side shows no certificate",
        "another authority's": "is not signed by an authority in DYN_TCP_TLS_CA",
        "expired": "certificate has expired",
        "a worker's TLS 1.2": "TLS failed: UNSUPPORTED_PROTOCOL",
    }[presents]
    [record] = [record for record in caplog.records if record.name == tls_gate.__name__]
    assert record.levelname == "WARNING"
    assert expected in record.message


async def test_refused_caller_gets_the_reason(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    chosen = authority.settings(stranger.issue(), "mutual")
    async with (
        running_server(authority.settings(authority.issue(), "mutual")) as server,
        running_client(chosen) as client,
    ):
        message = r"if it refuses this side's certificate, its log says why"
        await refusal(client, target(server), CannotConnect, message)


async def test_caller_in_the_clear_at_a_worker_that_speaks_tls(authority: Authority) -> None:
    async with (
        running_server(authority.settings(authority.issue())) as server,
        running_client({}) as client,
    ):
        await refusal(client, target(server), CannotConnect, "it speaks TLS.* set DYN_TCP_TLS=on")
        # By an old record, which says nothing of it: AuthenticationFailed has it read again.
        await refusal(
            client, target(server, mark=""), AuthenticationFailed, "speaks TLS only: set DYN_TCP_TLS=on"
        )
        assert server.connection_count == 0


async def test_caller_that_speaks_tls_at_a_worker_in_the_clear(authority: Authority) -> None:
    async with running_server({}) as server, running_client(authority.settings()) as client:
        await refusal(client, target(server), CannotConnect, "it does not speak TLS.* set it there")
        await refusal(
            client, target(server, mark="+tls"), CannotConnect, "does not speak TLS: set DYN_TCP_TLS"
        )


async def test_secret_is_proved_over_tls_as_well(authority: Authority) -> None:
    chosen = authority.settings(authority.issue(), "mutual")
    async with running_server(chosen) as server, running_client(chosen) as client:
        where = Target(INSTANCE, server.address, "echo", b"x" * 32)
        await refusal(client, where, AuthenticationFailed, "did not prove")


async def test_certificates_that_the_page_makes(repository: Path, tmp_path: Path) -> None:
    page = (repository / "docs" / "tls.md").read_text()
    recipe = re.search(r"<!-- recipe: a test runs it -->\n```sh\n(.*?)```", page, re.DOTALL)
    assert recipe is not None
    made = await asyncio.create_subprocess_exec(
        "sh", "-e", "-c", recipe[1], cwd=tmp_path, stdout=DEVNULL, stderr=DEVNULL
    )
    assert await made.wait() == 0

    def settings(name: str) -> dict[str, Any]:
        paths = {"tcp_tls_ca": "ca.crt", "tcp_tls_cert": f"{name}.crt", "tcp_tls_key": f"{name}.key"}
        return {"tcp_tls": "mutual"} | {field: tmp_path / file for field, file in paths.items()}

    async with running_server(settings("worker")) as server:
        async with running_client(settings("frontend")) as client:
            assert await ask(client, target(server), "hi") == "hi"
        named = settings("frontend") | {"tcp_tls_server_name": "worker.dynamo"}
        async with running_client(named) as client:
            assert await ask(client, target(server), "hi") == "hi"


# --------------------------------------------------------------------------- new certificates


@pytest.mark.usefixtures("always_looks")
async def test_worker_reloads_its_certificate_and_keeps_connections(authority: Authority) -> None:
    ours, renewed = authority.issue(), authority.issue()
    async with (
        running_server(authority.settings(ours)) as server,
        running_client(authority.settings()) as client,
    ):
        context = Context()
        stream = client.open(target(server, "count"), 2, context)
        assert await anext(stream) == 0
        before, expected = await shown_certificate(server, authority), certificate(renewed)
        renewed.move_to(ours)
        assert await shown_certificate(server, authority) == expected != before
        assert await anext(stream) == 1
        context.stop_generating()
        assert [item async for item in stream] == []
        ours.cert.write_bytes(b"broken")
        assert await shown_certificate(server, authority) == expected


@pytest.mark.usefixtures("always_looks")
async def test_authority_changes_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    """Both sides trust both authorities, then get certificates of the new one, then drop the old one."""
    worker, caller = authority.issue(), authority.issue()
    following = Authority(tmp_path, "next")
    async with (
        running_server(authority.settings(worker, "mutual")) as server,
        running_client(authority.settings(caller, "mutual")) as client,
        running_client(authority.settings(authority.issue(), "mutual")) as latecomer,
    ):

        async def works(one: TcpClient) -> None:
            assert await ask(one, target(server)) == 1
            for connection in tuple(server._connections):
                connection.close()  # so that the next request shakes hands again
            await eventually(lambda: one.connection_count == 0)

        await works(client)
        authority.path.write_bytes(authority.path.read_bytes() + following.path.read_bytes())
        await works(client)
        following.issue().move_to(worker)
        await works(client)
        following.issue().move_to(caller)
        await works(client)
        await works(latecomer)
        authority.path.write_bytes(following.path.read_bytes())
        await works(client)
        await refusal(latecomer, target(server), CannotConnect, "its log says why")


# --------------------------------------------------------------------------- slow and broken handshakes


async def test_tls_handshake_that_never_ends_is_ended(authority: Authority) -> None:
    chosen = authority.settings(authority.issue()) | {"connect_timeout_s": 0.2}
    async with running_server(chosen) as server:
        for opening in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
            reader, writer = await asyncio.open_connection(*host_and_port(server))
            writer.write(opening)
            async with asyncio.timeout(30):
                await _until_closed(reader)
            writer.transport.abort()
        await eventually(lambda: server.connection_count == 0)


async def test_handshakes_under_way_are_bounded(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_gate, "MAX_WAITING_COUNT", 5)
    chosen = authority.settings(authority.issue())
    async with running_server(chosen) as server, running_client(chosen) as client:
        idle = [await asyncio.open_connection(*host_and_port(server)) for _ in range(20)]
        await eventually(lambda: idle[14][0].at_eof())
        assert server.connection_count == 5
        assert await ask(client, target(server), "hi") == "hi", "the oldest makes room"
        for _, writer in idle:
            writer.transport.abort()
        await eventually(lambda: server.connection_count == 1)


async def test_unfinished_tls_handshakes_leave_room_for_callers(authority: Authority) -> None:
    chosen = authority.settings(authority.issue())
    async with (
        running_server(chosen | {"max_connections_count": 3}) as server,
        running_client(chosen) as client,
    ):
        idle = [await asyncio.open_connection(*host_and_port(server)) for _ in range(10)]
        await eventually(lambda: server.connection_count == 10)
        assert await ask(client, target(server), "hi") == "hi"
        for _, writer in idle:
            writer.transport.abort()
        await eventually(lambda: server.connection_count == 1)


async def test_full_worker_refuses_over_tls(authority: Authority) -> None:
    chosen = authority.settings(authority.issue(), "mutual")
    async with (
        running_server(chosen | {"max_connections_count": 1}) as server,
        running_client(chosen) as client,
        running_client(chosen) as late,
    ):
        assert await ask(client, target(server), "hi") == "hi"
        await refusal(late, target(server), Overloaded, "as many connections as it takes")
        assert await ask(client, target(server), "hi") == "hi"
        await eventually(lambda: server.connection_count == 1)


async def test_connection_dropped_as_its_tls_stands_leaves_nothing(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has the connection already, and the gate has not noticed yet."""
    chosen = authority.settings(authority.issue())
    async with running_server(chosen) as server, running_client(chosen) as client:
        gate, on_made = server._gate, server.on_made
        assert gate is not None

        def made_and_dropped(connection: ServerConnection) -> None:
            on_made(connection)
            assert gate.waiting_count == 1
            gate.drop_oldest()

        monkeypatch.setattr(server, "on_made", made_and_dropped)
        with pytest.raises(CannotConnect):
            await ask(client, target(server))
        await eventually(lambda: server.connection_count == 0)
        monkeypatch.undo()
        assert await ask(client, target(server), "hi") == "hi"


async def test_server_that_closes_drops_handshakes_under_way(authority: Authority) -> None:
    async with running_server(authority.settings(authority.issue())) as server:
        reader, writer = await asyncio.open_connection(*host_and_port(server))
        await eventually(lambda: server.connection_count == 1)
        await server.aclose()
        await _until_closed(reader)
        assert server.connection_count == 0
        writer.transport.abort()


async def test_recorded_connection_cannot_be_replayed(authority: Authority) -> None:
    caller = authority.issue()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=authority.path)
    context.load_cert_chain(caller.cert, caller.key)
    async with running_server(authority.settings(authority.issue(), "mutual")) as server:
        recorded, answered = await _call_by_hand(server, context)
        assert answered[-2:] == [INSTANCE, "hi"]
        await eventually(lambda: server.connection_count == 0)
        reader, writer = await asyncio.open_connection(*host_and_port(server))
        writer.write(recorded)
        async with asyncio.timeout(30):
            await _until_closed(reader)
        writer.transport.abort()
        await eventually(lambda: server.connection_count == 0)


async def _call_by_hand(server: TcpServer, context: ssl.SSLContext) -> tuple[bytes, Any]:
    """Send one request; return all bytes that went to the server, and the frame that came back."""
    reader, writer = await asyncio.open_connection(*host_and_port(server))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secured = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    recorded = bytearray()

    async def exchange(step: Callable[[], Any]) -> Any:
        while True:
            waits, answer = False, None
            try:
                answer = step()
            except ssl.SSLWantReadError:
                waits = True
            sent = outgoing.read()
            recorded.extend(sent)
            writer.write(sent)
            if not waits:
                return answer
            received = await asyncio.wait_for(reader.read(65_536), 30)
            assert received
            incoming.write(received)

    await exchange(secured.do_handshake)
    handshake = ClientHandshake(SECRET, 10, INSTANCE)
    await exchange(lambda: secured.write(handshake.first_message()))
    proof, _ = handshake.feed(memoryview(await exchange(lambda: secured.read(4096))))
    await exchange(lambda: secured.write(proof + pack([frame.OPEN, INSTANCE, "echo", 0, None, "hi"])))
    answered = await exchange(lambda: secured.read(4096))
    writer.transport.abort()
    return bytes(recorded), unpack(answered)


async def _until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(4096):
            continue
    except ConnectionError:
        return


# --------------------------------------------------------------------------- large payloads


@asynccontextmanager
async def slow_line(server: TcpServer) -> AsyncIterator[tuple[Proxy, Target]]:
    """Run a proxy before the server; yield it, and the target that leads through it."""
    host_and_port, _, mark = server.address.partition("+")
    async with Proxy(host_and_port) as proxy:
        port = proxy.url.rpartition(":")[2]
        yield proxy, Target(INSTANCE, f"127.0.0.1:{port}+{mark}", "echo", SECRET)


async def test_small_request_passes_a_stuck_large_one(authority: Authority) -> None:
    chosen = authority.settings(authority.issue(), "on")
    async with (
        running_server(chosen) as server,
        slow_line(server) as (proxy, where),
        running_client({**chosen, "keepalive_interval_s": 30}) as client,
    ):
        assert await ask(client, where) == 1
        proxy.connections[0].conditions = STALL
        large = asyncio.ensure_future(ask(client, where, bytes(16 << 20)))
        [pool] = client._pools.values()
        await eventually(lambda: [one.usable for one in pool._connections] == [True, True])
        assert pool._connections[0].unsent_bytes > 4 << 20
        async with asyncio.timeout(20):
            assert await ask(client, where, 2) == 2
        assert not large.done()
        proxy.connections[0].conditions = None
        async with asyncio.timeout(30):
            assert await large == bytes(16 << 20)


async def test_unsent_answer_is_seen_and_arrives(authority: Authority) -> None:
    chosen = authority.settings(authority.issue(), "on")
    large = bytes(range(256)) * (16 << 12)
    async with (
        running_server({**chosen, "keepalive_interval_s": 30}) as server,
        slow_line(server) as (proxy, where),
        running_client({**chosen, "keepalive_interval_s": 30}) as client,
    ):

        async def answer(_: Any, __: Context) -> bytes:
            proxy.conditions = STALL
            return large

        server.register("stalling", answer)
        asking = asyncio.ensure_future(ask(client, replace(where, subject="stalling")))
        await eventually(lambda: proxy.conditions is STALL and server.in_flight_count == 0)
        [connection] = server._connections
        assert connection.unsent_bytes > 4 << 20
        draining = asyncio.ensure_future(server.drain(grace_s=60))
        await eventually(lambda: connection.paused)
        proxy.conditions = GOOD
        async with asyncio.timeout(30):
            assert await asking == large
            await draining
