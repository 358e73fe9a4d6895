"""The trust between client and workers: workers restarted at the same port, and TLS."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings, child_environment, env_name
from dynamo_redis.errors import CannotConnect
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.runtime import Client, DistributedRuntime
from dynamo_redis.runtime.instance import Instance
from tests.certificates import Authority
from tests.processes import PROGRAMS

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]

ENDPOINT = "dynamo.backend.generate"
NAME = EndpointName.parse(ENDPOINT)
INSTANCE = InstanceId(0x5EC)
LEASE_TTL_S = 30.0

WORKER = PROGRAMS / "runtime_worker.py"


@dataclass
class Worker:
    """A worker in a process of its own."""

    process: asyncio.subprocess.Process
    instance_id: int
    address: str

    @property
    def port(self) -> str:
        return self.address.partition("/")[0].partition("+")[0].rpartition(":")[2]


StartWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, Any]:
    authority = Authority(tmp_path)
    return authority.settings(authority.issue(), "mutual")


@pytest.fixture
async def start_worker(
    dynamo_redis_url: str, dynamo_redis_prefix: str, tls: dict[str, Any]
) -> AsyncIterator[StartWorker]:
    processes: list[asyncio.subprocess.Process] = []

    async def start(port: str = "0") -> Worker:
        settings = {env_name(PlaneSettings.model_fields[name]): str(value) for name, value in tls.items()}
        settings |= {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}
        settings |= {"DYN_LEASE_TTL_S": str(LEASE_TTL_S), "DYN_TCP_RPC_PORT": port}
        environment = child_environment(settings | {"DYN_TCP_RPC_HOST": "127.0.0.1"})
        process = await asyncio.create_subprocess_exec(
            sys.executable, WORKER, ENDPOINT, env=environment, stdout=PIPE
        )
        processes.append(process)
        assert process.stdout is not None
        instance_id, address = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().split()
        return Worker(process, int(instance_id), address)

    yield start
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def ask(client: Client, request: Any = None) -> Any:
    [answer] = [item async for item in await client.round_robin(request, annotated=False)]
    return answer


async def until(condition: Callable[[], bool], within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_worker_restarted_on_its_port_is_trusted(
    open_runtime: OpenRuntime,
    start_worker: StartWorker,
    tls: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its record outlives it by a lease's TTL; meanwhile another process answers there.

    Callers see no error.
    """
    first, other = await asyncio.gather(start_worker(), start_worker())
    assert "+mtls/" in first.address
    runtime = await open_runtime(lease_ttl_s=LEASE_TTL_S, **tls)
    client = await runtime.endpoint(ENDPOINT).client()
    await until(lambda: len(client.instance_ids()) == 2)
    assert {await ask(client) for _ in range(4)} == {first.instance_id, other.instance_id}
    first.process.kill()
    await first.process.wait()
    again = await start_worker(first.port)
    assert again.address.partition("/")[0] == first.address.partition("/")[0]
    await until(lambda: len(client.instance_ids()) == 3)
    answered = [await ask(client) for _ in range(12)]
    async with asyncio.timeout(20):
        while again.instance_id not in answered:
            answered.append(await ask(client))
    assert first.instance_id not in answered
    assert await runtime.registry.get(NAME.instance_key(InstanceId(first.instance_id))) is not None


async def test_caller_with_other_settings_gets_a_clear_error(
    open_runtime: OpenRuntime, start_worker: StartWorker, tls: dict[str, Any]
) -> None:
    worker = await start_worker()
    in_the_clear = await (await open_runtime()).endpoint(ENDPOINT).client()
    without = {name: tls[name] for name in ("tcp_tls_ca",)} | {"tcp_tls": "on"}
    nameless = await (await open_runtime(**without)).endpoint(ENDPOINT).client()
    for client, message in (
        (in_the_clear, "it speaks TLS, and this process does not: set DYN_TCP_TLS=on"),
        (nameless, "it asks callers for a certificate: set DYN_TCP_TLS_CERT"),
    ):
        await client.wait_for_instances(10)
        for _ in range(2):
            with pytest.raises(CannotConnect, match=message):
                await ask(client)
    client = await (await open_runtime(**tls)).endpoint(ENDPOINT).client()
    await client.wait_for_instances(10)
    assert await ask(client) == worker.instance_id


@asynccontextmanager
async def serving(port: int, secret: bytes, answer: str) -> AsyncIterator[TcpServer]:
    server = TcpServer(
        PlaneSettings.load(tcp_host="127.0.0.1", tcp_port=port), secret=secret, instance_id=INSTANCE
    )

    async def handler(_: Any, __: Context) -> str:
        return answer

    server.register(NAME.subject(INSTANCE), handler)
    await server.start()
    try:
        yield server
    finally:
        await server.aclose()


def record(server: TcpServer, secret: bytes) -> bytes:
    transports = {"tcp": f"{server.address}/{NAME.subject(INSTANCE)}"}
    return Instance(NAME, INSTANCE, transports, secret=secret).to_bytes()


@pytest.mark.parametrize(("worker_auth", "caller_auth"), [("secret", "off"), ("off", "secret")])
async def test_caller_authenticates_by_the_workers_record(
    open_runtime: OpenRuntime, worker_auth: str, caller_auth: str
) -> None:
    async def echo(request: Any, _: Context) -> Any:
        return request

    worker, caller = await open_runtime(auth=worker_auth), await open_runtime(auth=caller_auth)
    served = await worker.endpoint(ENDPOINT).start_serving(echo)
    assert (served.instance.secret is None) == (worker_auth == "off")
    client = await caller.endpoint(ENDPOINT).client()
    await client.wait_for_instances(20)
    assert [item async for item in await client.round_robin("hi", annotated=False)] == ["hi"]


async def test_new_secret_is_read_from_the_record_once(open_runtime: OpenRuntime) -> None:
    """The same instance id has a new secret before the watch reports it."""
    runtime = await open_runtime()
    key = NAME.instance_key(INSTANCE)
    old, new = b"o" * 32, b"n" * 32
    async with serving(0, old, "old") as server:
        await runtime.registry.put(key, record(server, old))
        client = await runtime.endpoint(ENDPOINT).client()
        await client.wait_for_instances(10)
        assert await ask(client) == "old"
        port = int(server.address.rpartition(":")[2])
    watching = client._view._reader
    assert watching is not None
    watching.cancel()
    async with serving(port, new, "new") as server:
        await runtime.registry.put(key, record(server, new))
        assert await ask(client) == "new"
        assert await ask(client) == "new"
