"""Workers that fall silent: hosts without power, hosts that cannot be dialled, and workers that only pause.

A host without power refuses nothing and answers nothing. Here it is a network namespace whose link is taken
down: it needs root and `ip`, and is skipped without.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.runtime import DistributedRuntime, Settings, discovery
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.registry.memory import MemoryRegistry, MemoryServer
from faults.proxy import BLACK_HOLE, Proxy
from tests.processes import PROGRAMS

NAME = EndpointName("test", "words", "echo")
START_S = 60.0
BACK_S = 15.0

WORKERS = PROGRAMS / "pausing_workers.py"


class Deployment:
    """A registry in memory and a client; the records stay when workers fail."""

    def __init__(self) -> None:
        self._server = MemoryServer()
        self._registries: list[MemoryRegistry] = []
        self.runtime = DistributedRuntime(settings=Settings.load(), registry=MemoryRegistry(self._server))

    async def client(self) -> Client:
        return await self.runtime.endpoint(str(NAME)).client()

    async def register(self, number: int, address: str) -> MemoryRegistry:
        registry = MemoryRegistry(self._server, lease=LeaseId(number))
        await registry.start()
        self._registries.append(registry)
        instance = Instance(NAME, InstanceId(number), {"tcp": f"{address}/{NAME.subject(number)}"})
        await registry.register(NAME.instance_key(number), instance.to_bytes())
        return registry

    @contextlib.asynccontextmanager
    async def workers(
        self, *numbers: int, host: str = "127.0.0.1", within: str = ""
    ) -> AsyncIterator[list[MemoryRegistry]]:
        """Start instances with these ids in one process; return the registries that hold their records.

        `within` names a network namespace for the process, if it is given.
        """
        prefix = ("ip", "netns", "exec", within) if within else ()
        process = await asyncio.create_subprocess_exec(
            *(*prefix, sys.executable, WORKERS, host, str(NAME), *map(str, numbers)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            addresses = [await asyncio.wait_for(process.stdout.readline(), START_S) for _ in numbers]
            yield [
                await self.register(number, address.decode().strip())
                for number, address in zip(numbers, addresses, strict=True)
            ]
        finally:
            process.kill()
            await process.wait()

    async def aclose(self) -> None:
        await self.runtime.aclose()
        for registry in self._registries:
            await registry.aclose()


@pytest.fixture
async def deployment() -> AsyncIterator[Deployment]:
    made = Deployment()
    await made.runtime.start()
    yield made
    await made.aclose()


@dataclass(frozen=True, slots=True)
class Answered:
    """The time of a request, and its duration."""

    at: float
    took_s: float


class SteadyRequests:
    """Send a request every 10 ms. None may fail."""

    def __init__(self, client: Client) -> None:
        self.answered: list[Answered] = []
        self._client = client
        self._requests: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self._requests.add(asyncio.create_task(self._one()))
            await asyncio.sleep(0.01)

    async def _one(self) -> None:
        at = time.monotonic()
        assert [item async for item in await self._client.generate("word", annotated=False)] == ["word"]
        self.answered.append(Answered(at, time.monotonic() - at))

    async def stop(self) -> list[Answered]:
        self._task.cancel()
        await asyncio.gather(*self._requests)
        return self.answered


class Host:
    """A network namespace, joined to ours by a virtual cable."""

    def __init__(self) -> None:
        tag = os.getpid() % 100_000
        self.name, self._cable = f"dyn{tag}", f"dy{tag}"
        self.address = f"10.213.{tag % 256}.2"
        self._gateway = f"10.213.{tag % 256}.1"

    def start(self) -> None:
        self._ip("netns", "add", self.name)
        self._ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        self._ip("addr", "add", f"{self._gateway}/30", "dev", self._cable)
        self._ip("link", "set", self._cable, "up")
        self._inside("addr", "add", f"{self.address}/30", "dev", "eth0")
        self.switch("up")
        # With a permanent neighbour entry the kernel reports no missing host: packets are lost, as behind a
        # router.
        found = self._inside("-o", "link", "show", "eth0").split("link/ether ")[1].split()[0]
        self._ip("neigh", "replace", self.address, "lladdr", found, "dev", self._cable, "nud", "permanent")

    def switch(self, state: str) -> None:
        """Set the cable's other end `up` or `down`."""
        self._inside("link", "set", "eth0", state)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._ip("netns", "delete", self.name)

    def _inside(self, *arguments: str) -> str:
        return self._ip("-n", self.name, *arguments)

    def _ip(self, *arguments: str) -> str:
        done = subprocess.run(("ip", *arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout


@pytest.fixture
def host() -> Iterator[Host]:
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root and ip, to make a network namespace")
    made = Host()
    try:
        made.start()
    except OSError as exc:
        made.stop()
        pytest.skip(f"cannot make a network namespace here: {exc}")
    yield made
    made.stop()


async def test_hosts_without_power_are_avoided_and_come_back(
    deployment: Deployment, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three instances are switched off at once, under steady requests; then the third leaves."""
    monkeypatch.setattr(discovery, "_PROBE_PAUSE_S", (0.1, 0.4))
    async with deployment.workers(1, 2, host=host.address, within=host.name):
        client = await deployment.client()
        async with deployment.workers(3) as (third,):
            load = SteadyRequests(client)
            await asyncio.sleep(0.3)
            host.switch("down")
            off_at = time.monotonic()
            async with asyncio.timeout(BACK_S):
                while client.instance_ids() != [3]:
                    await asyncio.sleep(0.02)
            answered = await load.stop()
            await third.aclose()
        late = [one for one in answered if one.took_s > 0.4]
        assert late, "no request met the hosts without power"
        assert max(one.at for one in late) - off_at < 2.0
        assert max(one.took_s for one in late) < 3.5

        # When all hosts are known to be silent, requests do not wait for the connect time-out.
        began = time.monotonic()
        with pytest.raises(CannotConnect):
            await _all(await client.generate("word"))
        assert time.monotonic() - began < 2.5

        host.switch("up")
        async with asyncio.timeout(BACK_S):
            while client.instance_ids() != [1, 2]:
                await asyncio.sleep(0.02)


@pytest.fixture
def deaf() -> Iterator[str]:
    """Return an address that answers no SYN: its listener's queue is full."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            caller = sockets.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def test_request_does_not_wait_for_a_dial_if_another_serves(deployment: Deployment, deaf: str) -> None:
    await deployment.register(1, deaf)
    async with deployment.workers(2):
        client = await deployment.client()
        for _ in range(4):
            async with asyncio.timeout(2):
                assert [item async for item in await client.generate("word", annotated=False)] == ["word"]


async def test_paused_worker_is_avoided_and_loses_no_request(deployment: Deployment) -> None:
    async with deployment.workers(1), deployment.workers(2):
        client = await deployment.client()
        ticks = await client.direct("tick", 1, annotated=False)
        assert await anext(ticks) == "tick"
        pausing = asyncio.create_task(_all(await client.direct("pause", 1, annotated=False)))
        await asyncio.sleep(1.0)
        for _ in range(6):
            async with asyncio.timeout(0.15):
                assert await _all(await client.generate("word", annotated=False)) == ["word"]
        assert client.instance_ids() == [1, 2]
        assert not pausing.done()
        assert await pausing == ["pause"]
        assert len([item async for item in ticks]) == 59
        async with asyncio.timeout(BACK_S):
            while {await _chosen(client), await _chosen(client)} != {1, 2}:
                await asyncio.sleep(0.02)


async def _chosen(client: Client) -> int:
    """Return the id of the instance that answers."""
    return int((await _all(await client.generate("who", annotated=False)))[0])


async def _all(call: Any) -> list[Any]:
    return [item async for item in call]


async def test_probe_is_not_repeated_on_a_dead_connection() -> None:
    """A host that came back without its connections does not answer on the old ones, for minutes."""
    settings = PlaneSettings.load(tcp_host="127.0.0.1", auth="off")
    server, client = TcpServer(settings, secret=None, instance_id=1), TcpClient(settings)
    await server.start()
    async with (
        contextlib.aclosing(server),
        Proxy(f"redis://{server.address}") as proxy,
        contextlib.aclosing(client),
    ):
        target = Target(1, proxy.url.removeprefix("redis://"), "any")
        await client.probe(target, 5)
        proxy.connections[0].conditions = BLACK_HOLE
        with pytest.raises(CannotConnect):
            await client.probe(target, 0.2)
        await client.probe(target, 5)
