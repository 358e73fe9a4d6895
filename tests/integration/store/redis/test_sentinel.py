"""Redis Sentinel: one primary, two replicas and three sentinels, all real, on loopback."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from benchmarks.harness.processes import free_port

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.sentinel_server import EmbeddedSentinel, SentinelDeployment
from dynamo_redis.store.server import EmbeddedServer
from tests.certificates import Authority

WAIT_S = 60.0
SECRET = "Hunter2pass"


@pytest.fixture(scope="module")
async def steady(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SentinelDeployment]:
    """A deployment for the tests that make no failover."""
    async with SentinelDeployment(
        tmp_path_factory.mktemp("steady"), sentinel_settings={"requirepass": SECRET}
    ) as deployment:
        yield deployment


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[SentinelDeployment]:
    async with SentinelDeployment(tmp_path / "servers") as made:
        yield made


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.02)


async def refusal(url: str) -> StoreError:
    client = RedisClient(url, timeout_s=2.0)
    try:
        with pytest.raises(StoreError) as error:
            await client.connect()
        return error.value
    finally:
        await client.aclose()


async def put_until_taken(registry: Any, key: str, value: bytes) -> None:
    """Put a key, again and again while the store is away."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await registry.put(key, value)
            except StoreUnavailable:
                await asyncio.sleep(0.02)
            else:
                return


# ---------------------------------------------------------------------- without a failover


async def test_sentinels_with_password_lead_to_primary(steady: SentinelDeployment) -> None:
    client = RedisClient(f"{steady.url}?sentinel_password={SECRET}", timeout_s=5.0)
    primary = await steady.primary()
    await client.connect()
    assert client.address == f"127.0.0.1:{primary.port} (mymaster)"
    assert (await client.execute("ROLE"))[0] == b"master"
    await client.aclose()


async def test_missing_sentinel_password_is_named(steady: SentinelDeployment) -> None:
    for url in (steady.url, f"{steady.url}?sentinel_password=wrong{SECRET}"):
        error = await refusal(url)
        assert isinstance(error, StoreRefused)
        assert "sentinel_password" in str(error)
        assert SECRET not in str(error)


async def test_wrong_master_name_is_told_known_ones(steady: SentinelDeployment) -> None:
    error = await refusal(steady.url.replace("mymaster", "other") + f"?sentinel_password={SECRET}")
    assert isinstance(error, StoreRefused)
    assert "know no master other" in str(error)
    assert "they know mymaster" in str(error)


async def test_absent_sentinels_are_named(tmp_path: Path) -> None:
    error = await refusal("redis+sentinel://127.0.0.1:1,127.0.0.1:2/mymaster")
    assert isinstance(error, StoreUnavailable)
    assert "no sentinel of 127.0.0.1:1, 127.0.0.1:2 answers" in str(error)


async def test_sentinel_that_names_a_replica_is_not_followed(tmp_path: Path) -> None:
    replica = EmbeddedServer(tmp_path, port=0, settings={"replicaof": ("127.0.0.1", "1")})
    async with replica:
        directory = tmp_path / "sentinel"
        directory.mkdir()
        async with EmbeddedSentinel(directory, replica.port or 0, down_after_s=600) as sentinel:
            error = await refusal(f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster")
    assert isinstance(error, StoreUnavailable)
    assert "is a replica" in str(error)


async def test_hung_sentinel_delays_no_call(steady: SentinelDeployment) -> None:
    hung = steady.sentinels[0]
    hung.send_signal(signal.SIGSTOP)
    try:
        client = RedisClient(f"{steady.url}?sentinel_password={SECRET}", timeout_s=5.0)
        await client.execute("PING")
        await client.aclose()
    finally:
        hung.send_signal(signal.SIGCONT)


async def test_sentinels_and_servers_speak_tls(tmp_path: Path) -> None:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server on PATH")
    identity = Authority(tmp_path).issue()
    server, sentinel = free_port(), free_port()
    (tmp_path / "sentinel.conf").write_text(f"sentinel monitor mymaster 127.0.0.1 {server} 1\n")
    tls = ["--port", "0", "--tls-replication", "yes", "--tls-auth-clients", "no", "--bind", "127.0.0.1"]
    tls += ["--tls-cert-file", str(identity.cert), "--tls-key-file", str(identity.key)]
    tls += ["--tls-ca-cert-file", str(tmp_path / "ca.pem")]
    with ExitStack() as stack:
        for port, first in ((server, ("--save", "")), (sentinel, ("sentinel.conf", "--sentinel"))):
            words = (program, *first, "--tls-port", str(port), *tls)
            with (tmp_path / f"{port}.log").open("ab") as log:
                process = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        client = RedisClient(
            f"rediss+sentinel://127.0.0.1:{sentinel}/mymaster?ssl_ca_certs={tmp_path}/ca.pem", timeout_s=5.0
        )

        async def is_served() -> bool:
            if process.poll() is not None:
                pytest.skip("this redis-server was built without TLS")
            try:
                return bool(await client.execute("PING") == b"PONG")
            except StoreUnavailable:
                return False

        await until(is_served)
        sync = client.sync(5.0)
        await asyncio.to_thread(sync.connect)
        sync.close()
        error = await refusal(f"rediss+sentinel://127.0.0.1:{sentinel}/mymaster")
        assert "ssl_ca_certs" in str(error)
        await client.aclose()


# ---------------------------------------------------------------------- failovers


async def test_ordered_failover_moves_all_connections(
    deployment: SentinelDeployment, open_registry: Any, mirror: Any
) -> None:
    registry = await open_registry(deployment.url, ttl_s=10.0)
    other = await open_registry(deployment.url, ttl_s=10.0)
    seen = await mirror(other, "")
    await registry.register("i/1", b"v")
    old = await deployment.primary()
    await deployment.fail_over()
    new, _ = await deployment.wait_for_primary(other_than=old)
    await seen.until(lambda: str(new.port) in registry._client.address)  # the old one takes writes until then
    await put_until_taken(registry, "k", b"after")
    await seen.until_state({"i/1": b"v", "k": b"after"})

    async def only_new_has_clients() -> bool:
        clients = (await deployment.execute(old, "CLIENT", "LIST")).decode()
        return "name=dynamo-redis:" not in clients

    await until(only_new_has_clients)
    assert "name=dynamo-redis:" in (await deployment.execute(new, "CLIENT", "LIST")).decode()
    assert registry.lease_losses == other.lease_losses == 0


async def test_lease_is_renewed_at_once_at_a_new_primary(
    deployment: SentinelDeployment, open_registry: Any
) -> None:
    registry = await open_registry(deployment.url, ttl_s=3600.0)
    await registry.register("i/1", b"v")
    renewed = asyncio.Event()
    registry._keepalive._on_renewed = lambda _: renewed.set()
    old = await deployment.primary()
    await old.kill()
    async with asyncio.timeout(WAIT_S):  # a renewal is due in half an hour
        await renewed.wait()
    new, _ = await deployment.wait_for_primary(other_than=old)
    assert str(new.port) in registry._client.address


async def test_lossy_failover_is_healed(
    deployment: SentinelDeployment, open_registry: Any, mirror: Any
) -> None:
    registry = await open_registry(deployment.url, ttl_s=10.0)
    other = await open_registry(deployment.url, ttl_s=10.0)
    seen = await mirror(other, "")
    await registry.register("i/1", b"v")
    old = await deployment.primary()
    await deployment.cut_replication(old)
    await registry.register("i/2", b"acknowledged, and lost")
    await registry.put("without a lease", b"is lost")
    await seen.until(lambda: "i/2" in seen.state)
    await old.kill()
    await deployment.wait_for_primary(other_than=old)
    await put_until_taken(registry, "k", b"after")
    await seen.until_state({"i/1": b"v", "i/2": b"acknowledged, and lost", "k": b"after"})
    assert (await other.get("i/2")).value == b"acknowledged, and lost"
    assert await other.get("without a lease") is None


async def test_demoted_primary_that_lives_on_is_left(
    deployment: SentinelDeployment, open_registry: Any
) -> None:
    registry = await open_registry(deployment.url, ttl_s=10.0)
    idle = RedisClient(deployment.url, timeout_s=5.0)
    await idle.execute("PING")
    old = await deployment.primary()
    old.send_signal(signal.SIGSTOP)
    try:
        new, _ = await deployment.wait_for_primary(other_than=old)
        await put_until_taken(registry, "k", b"after")
    finally:
        old.send_signal(signal.SIGCONT)
    await idle.execute("SET", "written", "there")
    assert await deployment.execute(new, "GET", "written") == b"there"
    assert idle.address == f"127.0.0.1:{new.port} (mymaster)"
    await idle.aclose()


async def test_primary_serves_on_without_sentinels(
    deployment: SentinelDeployment, open_registry: Any
) -> None:
    registry = await open_registry(deployment.url)
    await registry.register("i/1", b"v")
    for sentinel in deployment.sentinels:
        await sentinel.kill()
    primary = deployment.servers[0]
    await deployment.execute(primary, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await put_until_taken(registry, "k", b"after")
    assert (await registry.get("i/1")).value == b"v"
    for sentinel in deployment.sentinels:
        await sentinel.start()
    await deployment.wait_until_ready()
    old = await deployment.primary()
    await deployment.fail_over()
    await deployment.wait_for_primary(other_than=old)
    await put_until_taken(registry, "k", b"after that")
