"""TLS to a NATS server, with and without certificates of its clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConfigError, PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from tests.certificates import Authority, Identity
from tests.nats_server import NatsServer, find_nats_server
from tests.tcp_plane import INSTANCE, SECRET, both_loops, echo

PASSWORD = "p4ssw0rd-of-the-test"
LOGIN = f'authorization {{ user: "dyn", password: "{PASSWORD}" }}'

pytestmark = pytest.mark.skipif(
    find_nats_server() is None, reason="no nats-server; on Debian and Ubuntu: apt-get install nats-server"
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """An authority that the server does not know."""
    return Authority(tmp_path, "stranger")


def tls(identity: Identity, clients: Authority | None = None) -> str:
    """Return the server's settings: its certificate, the authority of its clients, and a password."""
    checks = f'ca_file: "{clients.path}"\n verify: true' if clients is not None else ""
    return f'tls {{\n cert_file: "{identity.cert}"\n key_file: "{identity.key}"\n {checks}\n}}\n{LOGIN}'


def load(nats: NatsServer, **files: Any) -> PlaneSettings:
    return PlaneSettings.load(
        **{
            "request_plane": "nats",
            "nats_server": nats.url,
            "nats_username": "dyn",
            "nats_password": PASSWORD,
            "connect_timeout_s": 10.0,
        }
        | files
    )


async def ask(settings: PlaneSettings) -> list[Any]:
    """Return the answer of a worker to a caller, each with its own connection to the server."""
    server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
    client = make_client(settings)
    try:
        await server.start()
        server.register("echo", echo)
        to = Target(INSTANCE, server.address, "echo", SECRET)
        return [item async for item in client.open(to, bytes(100_000), Context())]
    finally:
        await client.aclose()
        await server.aclose()


@both_loops
@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_requests_travel_over_tls(scheme: str, authority: Authority, tmp_path: Path) -> None:
    with NatsServer(tmp_path, tls(authority.issue())) as nats:
        url = nats.url.replace("nats", scheme, 1)
        assert await ask(load(nats, nats_server=url, nats_tls_ca=authority.path)) == [bytes(100_000)]


@both_loops
async def test_requests_travel_over_mutual_tls(authority: Authority, tmp_path: Path) -> None:
    own = authority.issue("worker.example")
    with NatsServer(tmp_path, tls(authority.issue(), authority)) as nats:
        settings = load(nats, nats_tls_ca=authority.path, nats_tls_cert=own.cert, nats_tls_key=own.key)
        assert await ask(settings) == [bytes(100_000)]
        for shown in (repr(settings), str(settings)):
            assert PASSWORD not in shown


Change = Callable[[Authority, Authority], dict[str, Any]]


@pytest.mark.parametrize(
    ("is_mutual", "change", "said"),
    [
        (False, lambda _, other: {"nats_tls_ca": other.path}, "not signed by an authority in NATS_TLS_CA$"),
        (False, lambda _, __: {"nats_tls_ca": None}, "authority in NATS_TLS_CA, which is unset$"),
        (True, lambda _, __: {}, "it asks for a certificate: set NATS_TLS_CERT and NATS_TLS_KEY"),
        (True, lambda _, other: pair(other.issue("worker.example")), "NATS_TLS_CERT"),
    ],
    ids=["wrong authority", "no authority", "no certificate", "certificate of another authority"],
)
async def test_refused_tls_names_the_setting(
    is_mutual: bool,
    change: Change,
    said: str,
    authority: Authority,
    stranger: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with NatsServer(tmp_path, tls(authority.issue(), authority if is_mutual else None)) as nats:
        files = {"nats_tls_ca": authority.path} | change(authority, stranger)
        settings = load(nats, connect_timeout_s=2.0, **files)
        with pytest.raises(ConfigError, match=f"DYN_REQUEST_PLANE=nats: .*{said}") as at_worker:
            await ask(settings)
        client = make_client(settings)
        with pytest.raises(CannotConnect, match=said) as at_caller:
            async for _ in client.open(Target(INSTANCE, "dynamo.plane.1", "echo", SECRET), 1, Context()):
                pass
        await client.aclose()
        for shown in (str(at_worker.value), str(at_caller.value), caplog.text):
            assert PASSWORD not in shown


def pair(identity: Identity) -> dict[str, Any]:
    return {"nats_tls_cert": identity.cert, "nats_tls_key": identity.key}


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_nothing_is_sent_to_a_server_without_tls(
    scheme: str, authority: Authority, tmp_path: Path
) -> None:
    """The server, or one in its place, would read the password."""
    received: list[bytes] = []

    async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.9.10","max_payload":1048576,"headers":true}\r\n')
        received.append(await reader.read(1000))
        writer.close()

    listener = await asyncio.start_server(pose, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    settings = PlaneSettings.load(
        request_plane="nats",
        nats_server=f"{scheme}://dyn:{PASSWORD}@127.0.0.1:{port}",
        nats_tls_ca=authority.path,
        connect_timeout_s=2.0,
    )
    try:
        with pytest.raises(ConfigError, match="it offers no TLS") as found:
            await ask(settings)
        assert received
        assert set(received) == {b""}
        assert PASSWORD not in str(found.value)
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("cert",), "NATS_TLS_CERT is set and NATS_TLS_KEY is not"),
        (("key",), "NATS_TLS_KEY is set and NATS_TLS_CERT is not"),
        (("ca", "missing"), "NATS_TLS_CA=.*: cannot be read: No such file"),
        (("ca", "key"), "NATS_TLS_CA=.*: holds no certificate"),
        (("cert", "foreign key"), "NATS_TLS_KEY=.*: is not the key of the certificate"),
    ],
)
def test_files_without_use_are_named(
    files: tuple[str, ...], said: str, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    own, other = authority.issue(), stranger.issue()
    chosen: dict[tuple[str, ...], dict[str, Any]] = {
        ("cert",): {"nats_tls_cert": own.cert},
        ("key",): {"nats_tls_key": own.key},
        ("ca", "missing"): {"nats_tls_ca": tmp_path / "none"},
        ("ca", "key"): {"nats_tls_ca": own.key},
        ("cert", "foreign key"): {"nats_tls_cert": own.cert, "nats_tls_key": other.key},
    }
    settings = PlaneSettings.load(request_plane="nats", **chosen[files])
    with pytest.raises(ConfigError, match=said):
        make_client(settings)


async def test_tls_goes_on_after_the_server_restarts(authority: Authority, tmp_path: Path) -> None:
    with NatsServer(tmp_path, tls(authority.issue())) as nats:
        settings = load(nats, nats_tls_ca=authority.path)
        server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
        server.register("echo", echo)
        client = make_client(settings)
        await server.start()
        to = Target(INSTANCE, server.address, "echo", SECRET)

        async def is_answered() -> bool:
            try:
                return [item async for item in client.open(to, 1, Context())] == [1]
            except PlaneError:
                return False

        try:
            assert await is_answered()
            await asyncio.to_thread(nats.kill)
            await asyncio.to_thread(nats.start)
            async with asyncio.timeout(60):
                while not await is_answered():
                    await asyncio.sleep(0.05)
        finally:
            await client.aclose()
            await server.aclose()
