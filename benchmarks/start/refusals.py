"""S6: chats while their Redis takes no writes, and while it is replaced.

A frontend and two workers reach Redis by one address, which leads new connections to the current primary.
Each round has three phases, with a third of the chats each, at a fixed pace:

1. a planned failover: the replica is promoted, the old primary becomes its replica and goes on answering the
connections that it has, and the address leads to the new one;
2. memory is full (`maxmemory`, filled by keys of others);
3. the replica dies, and the primary demands one (`min-replicas-to-write 1`).

In each phase a worker and a frontend are started while the fault lasts; the last of its chats go through that
frontend. A chat fails by any status but 200, by a connection that breaks, and by taking longer than
`chats.LATE_S`.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.harness.chats import CountedChats, first_model
from benchmarks.harness.processes import free_port, running, up
from benchmarks.harness.report import Measured
from dynamo_redis.errors import StoreError
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from faults.proxy import Proxy

Fault = Callable[[], AbstractAsyncContextManager[None]]
"""Begins a fault, which is healed at the end of the block."""

PREFIX: Final = "bench-refusals"
CHATS: Final = 1_000
NEWCOMER_CHATS: Final = 20
CHATS_PER_S: Final = 50.0
BEFORE_S: Final = 1.0
READY_S: Final = 60.0
SETTLE_S: Final = 3.0

SETTINGS: Final = {"maxmemory": "64mb", "min-replicas-to-write": "1", "min-replicas-max-lag": "1"}
FILLER_BYTES: Final = (1 << 20, 1 << 14, 1 << 10, 1 << 6)


def refusals(rounds: int) -> dict[str, Measured]:
    """Measure S6: failed chats of 1,000 in the worst round. A median would hide a bad round."""
    return {"S6": Measured(max(uvloop.run(_refusals(rounds))), None, None, rounds)}


async def _refusals(rounds: int) -> list[float]:
    figures = []
    async with AsyncExitStack() as stack:
        pair = await stack.enter_async_context(_pair())
        options = ("--redis-url", pair.address.url, "--redis-prefix", PREFIX, "--speedup-ratio", "0")
        url = stack.enter_context(up(*options))
        chats = CountedChats(url, await asyncio.to_thread(first_model, url, READY_S), "S6")
        stack.callback(chats.close)
        await asyncio.sleep(SETTLE_S)
        phases = (pair.fail_over, pair.with_full_memory, pair.without_replica)
        shares = [CHATS // 3 + (number < CHATS % 3) for number in range(3)]
        for number in range(rounds):
            failed = [await _phase(*each, chats, pair) for each in zip(phases, shares, strict=True)]
            figures.append(float(sum(failed)))
            print(
                f"S6 round {number + 1}: failed of {CHATS:,} chats: {failed[0]} at the failover, "
                f"{failed[1]} while memory was full, {failed[2]} without the replica",
                flush=True,
            )
    return figures


async def _phase(fault: Fault, count: int, chats: CountedChats, pair: Pair) -> int:
    """Send `count` chats before, during and after a fault; return the number that failed."""
    flow = asyncio.create_task(chats.flow(count - NEWCOMER_CHATS, CHATS_PER_S))
    await asyncio.sleep(BEFORE_S)
    async with fault():
        with _start_newcomers(pair.address.url) as url:
            try:
                model = await asyncio.to_thread(first_model, url, READY_S)
            except RuntimeError:
                print("S6: a frontend that was started during the fault serves no model", flush=True)
                failed_count = NEWCOMER_CHATS
            else:
                newcomer = CountedChats(url, model, "S6")
                failed_count = await newcomer.flow(NEWCOMER_CHATS, CHATS_PER_S)
                newcomer.close()
    return failed_count + await flow


@contextmanager
def _start_newcomers(redis_url: str) -> Iterator[str]:
    """Start a worker and a frontend; yield the frontend's URL."""
    program = [sys.executable, "-m", "dynamo_redis"]
    environment = {"DYN_REDIS_URL": redis_url, "DYN_REDIS_PREFIX": PREFIX, "DYN_LOG": "error"}
    port = free_port()
    with ExitStack() as stack:
        stack.enter_context(running([*program, "worker", "mock", "--speedup-ratio", "0"], environment))
        frontend = [*program, "frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
        stack.enter_context(running(frontend, environment))
        yield f"http://127.0.0.1:{port}"


# --------------------------------------------------------------------------- the servers


class Pair:
    """A primary, its replica, and the address that leads to the primary."""

    def __init__(self, primary: Server, replica: Server, address: Proxy) -> None:
        self.primary = primary
        self.replica = replica
        self.address = address

    @asynccontextmanager
    async def fail_over(self) -> AsyncIterator[None]:
        """Exchange the roles of the two; nothing breaks, and nothing is healed afterwards."""
        old, new = self.primary, self.replica
        await new.client.execute("REPLICAOF", "NO", "ONE")
        await old.follow(new)
        self.address.target = new.embedded.url
        self.primary, self.replica = new, old
        yield
        await self.wait_until_replicated()

    @asynccontextmanager
    async def with_full_memory(self) -> AsyncIterator[None]:
        """Fill the memory with other keys; delete them at the end."""
        filler: list[str] = []
        for size_bytes in FILLER_BYTES:
            with suppress(StoreError):  # the memory is full for keys of this size
                while True:
                    key = f"filler:{len(filler)}"
                    await self.primary.client.execute("SET", key, bytes(size_bytes))
                    filler.append(key)
        yield
        await self.primary.client.execute("DEL", *filler)

    @asynccontextmanager
    async def without_replica(self) -> AsyncIterator[None]:
        """Kill the replica; start it again at the end."""
        await self.replica.embedded.kill()
        await self.primary.until("min_slaves_good_slaves:0")
        yield
        await self.replica.embedded.start()
        await self.replica.follow(self.primary)
        await self.wait_until_replicated()

    async def wait_until_replicated(self) -> None:
        """Wait until the replica follows, and the primary knows it."""
        await self.replica.until("master_link_status:up")
        await self.primary.until("min_slaves_good_slaves:1")


class Server:
    """A Redis, and a connection to it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.embedded = EmbeddedServer(directory, port=0, settings=SETTINGS)
        self.client: RedisClient

    async def start(self) -> None:
        await self.embedded.start()
        self.client = RedisClient(self.embedded.url, timeout_s=10, client_name="bench")

    async def stop(self) -> None:
        await self.client.aclose()
        await self.embedded.stop()

    async def follow(self, primary: Server) -> None:
        """Make it a replica of `primary`."""
        host, _, port = primary.embedded.url.removeprefix("redis://").partition(":")
        await self.client.execute("REPLICAOF", host, port)

    async def until(self, line: str) -> None:
        """Wait until INFO shows a line about replication."""
        async with asyncio.timeout(READY_S):
            while line not in (await self.client.execute("INFO", "replication")).decode().splitlines():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def _pair() -> AsyncIterator[Pair]:
    """Start a primary and a replica in sync with it, behind one address."""
    with tempfile.TemporaryDirectory() as directory:
        servers = Server(Path(directory) / "a"), Server(Path(directory) / "b")
        try:
            for server in servers:
                await server.start()
            async with Proxy(servers[0].embedded.url) as address:
                pair = Pair(*servers, address)
                await pair.replica.follow(pair.primary)
                await pair.wait_until_replicated()
                yield pair
        finally:
            for server in servers:
                await server.stop()
