"""A cluster whose nodes speak TLS only, to each other and to clients, and demand client certificates."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from benchmarks.harness.processes import free_port

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.cluster.client import ClusterClient
from tests.certificates import Authority

SLOTS = (range(8192), range(8192, 16384))
WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class TlsCluster:
    """Two masters, and the parameters of URLs with and without a client certificate."""

    ports: list[int]
    trusting: str
    identified: str

    def url(self, parameters: str) -> str:
        return f"rediss+cluster://127.0.0.1:{self.ports[0]}?{parameters}"


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
async def tls_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TlsCluster]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server on PATH")
    directory = tmp_path_factory.mktemp("tls")
    authority = Authority(directory)
    identity, own = authority.issue(), authority.issue("client")
    trusting = f"ssl_ca_certs={authority.path}"
    identified = f"{trusting}&ssl_certfile={own.cert}&ssl_keyfile={own.key}"
    options = ["--port", "0", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    options += ["--tls-auth-clients", "yes", "--tls-cluster", "yes", "--tls-replication", "yes"]
    options += ["--tls-cert-file", str(identity.cert), "--tls-key-file", str(identity.key)]
    options += ["--tls-ca-cert-file", str(authority.path), "--cluster-enabled", "yes"]
    ports, bus_ports = [free_port(), free_port()], [free_port(), free_port()]
    with ExitStack() as stack:
        processes = []
        for port, bus_port in zip(ports, bus_ports, strict=True):
            here = directory / str(port)
            here.mkdir()
            words = (program, "--tls-port", str(port), "--cluster-port", str(bus_port), *options)
            with (directory / f"{port}.log").open("ab") as log:
                process = subprocess.Popen(words, cwd=here, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        nodes = [RedisClient(f"rediss://127.0.0.1:{port}?{identified}", timeout_s=5.0) for port in ports]

        async def all_answer() -> bool:
            if any(process.poll() is not None for process in processes):
                pytest.skip("this redis-server was built without TLS, or is older than 7.0")
            try:
                return all([await node.execute("PING") == b"PONG" for node in nodes])
            except StoreUnavailable:
                return False

        async def is_whole() -> bool:
            states = [await node.execute("CLUSTER", "INFO") for node in nodes]
            return all(b"cluster_state:ok" in state for state in states)

        await until(all_answer)
        for epoch, (node, slots) in enumerate(zip(nodes, SLOTS, strict=True), start=1):
            await node.execute("CLUSTER", "ADDSLOTSRANGE", str(slots[0]), str(slots[-1]))
            await node.execute("CLUSTER", "SET-CONFIG-EPOCH", str(epoch))
        await nodes[0].execute("CLUSTER", "MEET", "127.0.0.1", str(ports[1]), str(bus_ports[1]))
        await until(is_whole)
        for node in nodes:
            await node.aclose()
        yield TlsCluster(ports, trusting, identified)


async def test_each_node_is_reached_by_tls_with_a_client_certificate(tls_cluster: TlsCluster) -> None:
    """The other nodes' addresses come from the first one, and are spoken to in the same way."""
    client = ClusterClient(tls_cluster.url(tls_cluster.identified), timeout_s=5.0)
    try:
        for number in range(20):
            await client.execute("SET", f"key-{number}", str(number))
        assert [await client.execute("GET", f"key-{number}") for number in range(20)] == [
            str(number).encode() for number in range(20)
        ]
    finally:
        await client.aclose()
    for port in tls_cluster.ports:
        node = RedisClient(f"rediss://127.0.0.1:{port}?{tls_cluster.identified}", timeout_s=5.0)
        assert await node.execute("DBSIZE")
        await node.aclose()


async def test_registry_works_on_a_cluster_with_tls(tls_cluster: TlsCluster, open_registry: Any) -> None:
    url = tls_cluster.url(tls_cluster.identified)
    registry, other = await open_registry(url, ttl_s=10.0), await open_registry(url, ttl_s=10.0)
    await registry.register("i/1", b"v")
    assert (await other.get("i/1")).value == b"v"


async def refusal(url: str) -> StoreError:
    client = ClusterClient(url, timeout_s=5.0)
    try:
        with pytest.raises(StoreError) as caught:
            await client.execute("GET", "key")
        return caught.value
    finally:
        await client.aclose()


async def test_client_without_a_certificate_is_refused(tls_cluster: TlsCluster) -> None:
    assert "no node of the cluster" in str(await refusal(tls_cluster.url(tls_cluster.trusting)))


async def test_unknown_authority_is_named_with_its_remedy(tls_cluster: TlsCluster) -> None:
    """As behind the other routes: it is an error of the settings, not an outage that will pass."""
    error = await refusal(tls_cluster.url(""))
    assert isinstance(error, StoreRefused)
    assert "?ssl_ca_certs=FILE" in str(error)
