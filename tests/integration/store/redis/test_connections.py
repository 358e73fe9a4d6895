"""Connections: accepted servers, forms of URLs, and the messages for servers that are refused or not
reached."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import ConfigError, SchemaMismatch, StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.server import EmbeddedServer

SECRET = "s3cret/with:odd@signs"
QUOTED = "s3cret%2Fwith%3Aodd%40signs"


async def refusal(url: str, timeout_s: float = 1.0) -> StoreError:
    registry = RedisRegistry(StoreSettings.load(redis_url=url, command_timeout_s=timeout_s))
    with pytest.raises(StoreError) as error:
        await registry.start()
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)
    assert QUOTED not in str(error.value)
    await registry.aclose()
    return error.value


@pytest.fixture
async def server_with_users(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """`admin` has all rights; `registry` only those that the registry needs; `reader` may not write."""
    (tmp_path / "users.acl").write_text(
        "user default off\n"
        f"user admin on >{SECRET} ~* &* +@all\n"
        f"user registry on >{SECRET} ~{{dynamo}}:* resetchannels &__keyspace@0__:{{dynamo}}:lease:* -@all"
        " +@read +@write +@stream +@scripting +ping +time +psubscribe\n"
        f"user reader on >{SECRET} ~* &* +@all -@write\n"
    )
    async with EmbeddedServer(tmp_path, port=0, settings={"aclfile": str(tmp_path / "users.acl")}) as server:
        yield server


def with_user(server: EmbeddedServer, user: str, password: str = QUOTED) -> str:
    return server.url.replace("redis://", f"redis://{user}:{password}@")


async def test_an_unreachable_server_is_named_without_its_password() -> None:
    error = await refusal(f"redis://user:{QUOTED}@127.0.0.1:1")
    assert isinstance(error, StoreUnavailable)
    assert "no Redis answers at 127.0.0.1:1 (connection refused): is it running there?" in str(error)
    assert error.retryable


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1000):
        pass
    writer.close()
    await writer.wait_closed()


async def test_a_server_that_does_not_answer_is_given_up_in_time() -> None:
    silent = await asyncio.start_server(_say_nothing, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    error = await refusal(f"redis://127.0.0.1:{silent.sockets[0].getsockname()[1]}", timeout_s=0.5)
    assert isinstance(error, StoreUnavailable)
    assert "in time" in str(error)
    assert loop.time() - began_at < 8
    silent.close()
    await silent.wait_closed()


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_error_names_an_answer_that_is_not_from_redis(scheme: str) -> None:
    async def answer_as_a_web_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(b"<html>no</html>\r\n")
        writer.close()

    web = await asyncio.start_server(answer_as_a_web_server, "127.0.0.1", 0)
    error = await refusal(f"{scheme}://127.0.0.1:{web.sockets[0].getsockname()[1]}")
    assert isinstance(error, StoreRefused)
    assert ("is not a Redis" if scheme == "redis" else "If not, write redis://") in str(error)
    web.close()
    await web.wait_closed()


async def test_error_names_a_server_without_tls(dynamo_redis_url: str) -> None:
    error = await refusal(dynamo_redis_url.replace("redis://", "rediss://"), timeout_s=0.5)
    assert isinstance(error, StoreUnavailable)
    assert "If not, write redis://" in str(error)


async def test_server_that_answered_gets_no_hint_of_another_protocol(
    own_redis_server: EmbeddedServer, open_proxy: Any
) -> None:
    proxy = await open_proxy(own_redis_server.url)
    client = RedisClient(proxy.url, timeout_s=1.0)
    await client.connect()
    proxy.refuse = True
    proxy.cut()
    with pytest.raises(StoreUnavailable) as error:
        await client.execute("PING")
    assert "TLS" not in str(error.value)
    await client.aclose()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "noeviction"])
async def test_a_server_that_evicts_keys_is_warned_of(
    own_redis_server: EmbeddedServer, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    await client.execute("CONFIG", "SET", "maxmemory-policy", policy)
    await client.connect()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    if policy == "noeviction":
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert f"maxmemory-policy {policy}" in warnings[0]
        assert "noeviction" in warnings[0]
    await client.aclose()


async def test_a_foreign_key_in_the_place_of_ours_is_said(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    client = RedisClient(dynamo_redis_url, timeout_s=1.0)
    await client.execute("SET", RegistryKeys(dynamo_redis_prefix).meta, "another program's")
    registry = RedisRegistry(StoreSettings.load(redis_url=dynamo_redis_url, prefix=dynamo_redis_prefix))
    with pytest.raises(StoreRefused, match="choose another DYN_REDIS_PREFIX"):
        await registry.start()
    await registry.aclose()
    await client.aclose()


async def test_a_missing_or_wrong_password_is_said(server_with_users: EmbeddedServer) -> None:
    error = await refusal(server_with_users.url)
    assert isinstance(error, StoreRefused)
    assert "needs a password" in str(error)
    for url in (with_user(server_with_users, "admin", "wrong"), with_user(server_with_users, "nobody")):
        error = await refusal(url)
        assert isinstance(error, StoreRefused)
        assert "refuses the user name or password" in str(error)


async def test_error_names_a_needless_password(dynamo_redis_url: str) -> None:
    error = await refusal(dynamo_redis_url.replace("redis://", f"redis://:{QUOTED}@"))
    if isinstance(error, StoreRefused):
        assert "password" in str(error)


async def test_user_without_the_right_to_write_is_refused(server_with_users: EmbeddedServer) -> None:
    error = await refusal(with_user(server_with_users, "reader"))
    assert isinstance(error, StoreRefused)
    assert "permit" in str(error)


async def test_a_user_with_the_least_rights_is_enough(
    server_with_users: EmbeddedServer, mirror: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "dynamo_redis")
    settings = StoreSettings.load(redis_url=with_user(server_with_users, "registry"), lease_ttl_s=1)
    worker, watcher = RedisRegistry(settings), RedisRegistry(settings)
    await worker.start()
    await watcher.start()
    view = await mirror(watcher, "i/")
    await worker.register("i/1", b"v")
    await view.until_state({"i/1": b"v"})
    worker._registrations._held = False  # so that closing it does not revoke the lease
    await worker.aclose()
    await view.until_state({})  # by ticks, and by notifications if there are any
    await watcher.aclose()
    assert SECRET not in caplog.text
    assert QUOTED not in caplog.text


async def test_expiry_notifications_are_added_to_those_in_use(
    own_redis_server: EmbeddedServer, open_registry: Any
) -> None:
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    await client.execute("CONFIG", "SET", "notify-keyspace-events", "El")
    await open_registry(own_redis_server.url)
    async with asyncio.timeout(30):
        while True:
            flags = (await client.execute("CONFIG", "GET", "notify-keyspace-events"))[1].decode()
            if set("ElKxe") <= set(flags):
                break
            await asyncio.sleep(0.02)
    assert "g" not in flags, "each renewal of a lease would be announced to all processes"
    await client.aclose()


@pytest.mark.parametrize("turns", range(1, 7))
async def test_cancelled_close_leaves_no_connection_open(turns: int, dynamo_redis_url: str) -> None:
    name = f"closed-{turns}"
    watcher = RedisClient(dynamo_redis_url, timeout_s=5.0)
    client = RedisClient(dynamo_redis_url, timeout_s=5.0, client_name=name)
    await asyncio.gather(*(client.execute("PING") for _ in range(3)))
    assert name in (await watcher.execute("CLIENT", "LIST")).decode()
    closing = asyncio.create_task(client.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    async with asyncio.timeout(60):
        while name in (await watcher.execute("CLIENT", "LIST")).decode():
            await asyncio.sleep(0.01)
    await watcher.aclose()


async def test_close_passes_a_connection_of_an_ended_event_loop(
    dynamo_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    client = RedisClient(dynamo_redis_url, timeout_s=5.0)
    await asyncio.gather(*(client.execute("PING") for _ in range(3)))
    connections = tuple(client._pool._available_connections)
    monkeypatch.setattr(connections[0], "_close", fail)
    await client.aclose()
    assert not any(connection.is_connected for connection in connections)


async def test_a_process_starts_and_reads_on_a_replica(
    own_redis_server: EmbeddedServer, tmp_path: Path, open_registry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "replica"
    directory.mkdir()
    port = own_redis_server.url.rpartition(":")[2]
    worker = await open_registry(own_redis_server.url)
    await worker.register("i/worker", b"v")
    settings = {"replicaof": ("127.0.0.1", str(port))}
    async with EmbeddedServer(directory, port=0, settings=settings) as replica:
        client = RedisClient(replica.url, timeout_s=3.0)
        async with asyncio.timeout(20):
            while not await client.execute("KEYS", "*meta"):
                await asyncio.sleep(0.05)
        await client.aclose()
        reader = await open_registry(replica.url)
        watch = reader.watch("i/")
        assert len((await anext(watch)).events) == 1
        await worker.register("i/more", b"v")
        assert len((await anext(watch)).events) == 1
        with pytest.raises(StoreError, match="read-only replica"):
            await reader.put("k", b"v")
        await reader.aclose()
    assert f"set DYN_REDIS_URL to its primary (127.0.0.1:{port})" in caplog.text


async def test_a_demoted_primary_is_left_and_found_again(
    own_redis_server: EmbeddedServer, open_registry: Any
) -> None:
    registry = await open_registry(own_redis_server.url)
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    await client.execute("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreError):
        await registry.put("k", b"v")
    await client.execute("REPLICAOF", "NO", "ONE")
    async with asyncio.timeout(30):
        while True:
            try:
                await registry.put("k", b"v")
                break
            except StoreError:
                await asyncio.sleep(0.05)
    await client.aclose()


async def _answer_as_old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that answers only as much of Redis 5 as the version check needs."""
    info = b"redis_version:5.0.14\r\nredis_mode:standalone\r\n"
    while line := await reader.readline():
        words = []
        for _ in range(int(line[1:])):
            size = int((await reader.readline())[1:])
            words.append((await reader.readexactly(size + 2))[:-2].upper())
        match words[0]:
            case b"PING":
                writer.write(b"+PONG\r\n")
            case b"INFO":
                writer.write(b"$%d\r\n%s\r\n" % (len(info), info))
            case _:
                writer.write(b"-ERR unknown command\r\n")
    writer.close()
    await writer.wait_closed()


async def test_a_server_that_is_too_old_is_refused() -> None:
    old = await asyncio.start_server(_answer_as_old, "127.0.0.1", 0)
    error = await refusal(f"redis://127.0.0.1:{old.sockets[0].getsockname()[1]}")
    assert isinstance(error, StoreRefused)
    assert "version 5.0.14" in str(error)
    assert "upgrade it to 6.2" in str(error)
    old.close()
    await old.wait_closed()


async def test_another_major_schema_is_refused_and_a_minor_one_is_not(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any
) -> None:
    registry = await open_registry(dynamo_redis_url)
    await registry.put("k", b"v")
    meta = RegistryKeys(dynamo_redis_prefix).meta
    client = RedisClient(dynamo_redis_url, timeout_s=1.0)
    await client.execute("HSET", meta, "schema", "1.7")
    other = await open_registry(dynamo_redis_url)
    assert (await other.get("k")).value == b"v"
    await client.execute("HSET", meta, "schema", "2")
    with pytest.raises(SchemaMismatch, match=r"schema version 2, this release reads 1"):
        await open_registry(dynamo_redis_url)
    with pytest.raises(SchemaMismatch):
        await registry.put("k", b"w")
    await client.execute("HSET", meta, "schema", "1")
    assert (await registry.get("k")).value == b"v", "nothing was touched"
    await client.aclose()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"http://:{QUOTED}@localhost", "redis://, rediss://, unix://"),
        ("localhost:6379", "redis://, rediss://, unix://"),
        (f"redis://:{QUOTED}@localhost:port", "DYN_REDIS_URL"),
        (f"redis://:{QUOTED}@localhost:6379/3", "only database 0"),
        (f"redis://:{QUOTED}@localhost?no_such_option=1", "there is no option 'no_such_option'"),
        (f"redis://:{QUOTED}@localhost?ssl_ca_certs=x", "there is no option 'ssl_ca_certs'"),
        (f"redis://:{QUOTED}@localhost?socket_keepalive=yes&socket_timeout=x", "'socket_timeout'"),
        (f"redis://:{QUOTED}@localhost:6379/cache", "only a database"),
        (f"redis://:{QUOTED}@::1:6379", "[::1]:6379"),
        (f"redis://:{QUOTED}@a:6379,b:6379", "several servers"),
        (f"rediss://:{QUOTED}@localhost?ssl_ca_certs=/no/such/ca.pem", "there is no file /no/such/ca.pem"),
        (f"rediss://:{QUOTED}@localhost?ssl_certfile=/no/such.crt&ssl_keyfile=/x", "no file /no/such.crt"),
        (f"rediss://:{QUOTED}@localhost?ssl_ca_certs={__file__}", "certificates (PEM)"),
        (f"rediss://:{QUOTED}@localhost?ssl_cert_reqs=CERT_NONE", "required, optional or none"),
        ("unix://", "DYN_REDIS_URL"),
    ],
)
async def test_a_url_that_cannot_be_used_is_a_config_error(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        RedisClient(url, timeout_s=1.0)
    assert says in str(error.value)
    assert QUOTED not in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("user", ["", "default"])
@pytest.mark.parametrize("rest", ["@127.0.0.1:6379", "@127.0.0.1:6379/0", "@[::1]:6379"])
@pytest.mark.parametrize(
    "password",
    [
        "Hunter#2", "57#Wc903z", "Hunter/2pass", "57/Wc903z", "Hunter?2pass", "57?Wc903z", "57?x=Wc903z",
        "Hunt[er2", "S3cr#et/9?@:%z w",
    ],
)  # fmt: skip
def test_a_password_that_breaks_a_url_is_not_shown(user: str, password: str, rest: str) -> None:
    with pytest.raises(ConfigError) as error:
        RedisClient(f"redis://{user}:{password}{rest}", timeout_s=1.0)
    said = str(error.value)
    assert "# as %23, / as %2F, ? as %3F" in said
    for piece in re.findall(r"[A-Za-z0-9]{2,}", password):
        assert piece not in said


@pytest.mark.parametrize("password", ["S3cr#et/9?@:%z w", "p@ss", "a=b&c", "[x]"])
def test_an_encoded_password_is_taken(password: str) -> None:
    for url in (
        f"redis://:{quote(password, safe='')}@127.0.0.1:6379",
        f"redis://default:{quote(password, safe='')}@127.0.0.1:6379/0",
        f"redis://127.0.0.1:6379/0?password={quote(password, safe='')}",
        f"  redis://:{quote(password, safe='')}@127.0.0.1:6379\n",
    ):
        client = RedisClient(url, timeout_s=1.0)
        assert client.address == "127.0.0.1:6379"
        assert client._pool.connection_kwargs["password"] == password


async def test_a_unix_socket_works(tmp_path: Path, dynamo_redis_prefix: str) -> None:
    async with EmbeddedServer(tmp_path) as server:
        assert server.url.startswith("unix://")
        registry = RedisRegistry(StoreSettings.load(redis_url=server.url, prefix=dynamo_redis_prefix))
        await registry.start()
        await registry.register("i/1", b"v")
        assert (await registry.get("i/1")) is not None
        await registry.aclose()
    assert isinstance(await refusal(server.url), StoreUnavailable)


# --------------------------------------------------------------------------- TLS


def _make_certificates(directory: Path) -> None:
    """A CA, and its certificate for 127.0.0.1, in the strict form that Python 3.13 requires (RFC 5280)."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl("req", "-x509", *new, *usage, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test-ca")
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    openssl("req", *new[:-2], "-keyout", "redis.key", "-out", "redis.csr", "-subj", "/CN=redis")
    openssl(
        "x509", "-req", "-in", "redis.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "san", "-out", "redis.crt",
    )  # fmt: skip


async def test_tls_is_used_and_verified(tmp_path: Path, mirror: Any) -> None:
    server = shutil.which("redis-server")
    if server is None or shutil.which("openssl") is None:
        pytest.skip("needs redis-server and openssl on PATH")
    _make_certificates(tmp_path)
    port = _free_port()
    process = subprocess.Popen(
        [
            server, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", "",
            "--tls-cert-file", "redis.crt", "--tls-key-file", "redis.key", "--tls-ca-cert-file", "ca.crt",
            "--tls-auth-clients", "no",
        ],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            while not await _is_listening(port):
                if process.poll() is not None:
                    pytest.skip("this redis-server was built without TLS")
                await asyncio.sleep(0.02)
        url = f"rediss://127.0.0.1:{port}"
        error = await refusal(url)
        assert isinstance(error, StoreRefused), "an untrusted certificate is not a passing trouble"
        assert "ssl_ca_certs" in str(error)
        error = await refusal(f"redis://127.0.0.1:{port}")
        assert isinstance(error, StoreUnavailable | StoreRefused)
        assert "rediss://" in str(error)
        trusted = f"{url}?ssl_ca_certs={tmp_path}/ca.crt"
        registry = RedisRegistry(StoreSettings.load(redis_url=trusted, lease_ttl_s=1))
        await registry.start()
        view = await mirror(registry, "i/")
        await registry.register("i/1", b"v")
        await view.until_state({"i/1": b"v"})
        await asyncio.sleep(1.5)
        assert view.state == {"i/1": b"v"}, "the keepalive's connection is encrypted as well"
        await registry.aclose()
        wrong_name = trusted.replace("127.0.0.1", "localhost")
        error = await refusal(wrong_name)
        assert isinstance(error, StoreRefused)
        assert "ssl_check_hostname" in str(error)
        assert "ssl_ca_certs" not in str(error), "the CA is known"
    finally:
        process.kill()
        process.wait()


async def _is_listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
