"""Rows of suite `request` about connections: the memory of an idle one, and the cost of stopped readers for
others."""

from __future__ import annotations

import asyncio
import gc
import sys
import time

import psutil
import uvloop

from benchmarks.harness.processes import driver, in_fresh_process
from benchmarks.harness.report import Measured, median
from benchmarks.request.rivals.plane import PlanePeer, target
from benchmarks.request.sides import announced
from benchmarks.request.workloads import ITEMS, Workload
from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import RequestPlaneClient, ResponseStream, Target
from dynamo_redis.planes.select import make_client

CONNECTIONS = 1000
_AT_ONCE = 50
_SETTLE_S = 1.0

FAST, STOPPED = 54, 10
_ENDLESS = 1_000_000_000
_FAST_READERS = Workload("fast readers", "tick", FAST, "items", ITEMS)


def idle_connections(rounds: int) -> Measured:
    """Measure the KiB of a server process for each of a thousand connections that have had a request and are
    idle now."""
    servers, clients = [], []
    for number in range(rounds):
        with driver(sys.executable, "request.rivals.peers", "serve", "plane", "0.0.0.0") as server:
            port = int(announced(server).rpartition(":")[2])
            at_server, at_client = in_fresh_process(_connections, port, server.pid)
        servers.append(at_server)
        clients.append(at_client)
        print(
            f"P14 round {number + 1}: {at_server:.1f} KiB a connection at the server, "
            f"{at_client:.1f} KiB at the client",
            flush=True,
        )
    print(f"P14: memory of a connection at the client: {median(clients):g} KiB", flush=True)
    return Measured.alone(servers)


def _connections(port: int, server_id: int) -> tuple[float, float]:
    """Return the KiB a connection at the server and here, where one client has a thousand instances."""
    return uvloop.run(_connect(port, server_id))


async def _connect(port: int, server_id: int) -> tuple[float, float]:
    processes = psutil.Process(server_id), psutil.Process()
    client = make_client(PlaneSettings.load())
    # The whole of 127.0.0.0/8 is this machine: a thousand addresses, and so connections, of one server.
    hosts = [f"127.0.{1 + number // 200}.{1 + number % 200}" for number in range(CONNECTIONS)]
    targets = [target(f"{host}:{port}", "echo") for host in hosts]
    gc.collect()
    empty = [process.memory_info().rss for process in processes]
    for begin in range(0, CONNECTIONS, _AT_ONCE):
        await asyncio.gather(*(_ask(client, one) for one in targets[begin : begin + _AT_ONCE]))
    await asyncio.sleep(_SETTLE_S)
    gc.collect()
    held = [process.memory_info().rss for process in processes]
    at_server, at_client = (
        (after - before) / 1024 / CONNECTIONS for before, after in zip(empty, held, strict=True)
    )
    established = sum(1 for one in processes[0].net_connections("tcp") if one.status == "ESTABLISHED")
    if established != CONNECTIONS:
        raise RuntimeError(f"{established} connections are open, not {CONNECTIONS}")
    await client.aclose()
    return at_server, at_client


async def _ask(client: RequestPlaneClient, where: Target) -> None:
    async for _ in client.open(where, b"x" * 128, None):
        pass


def stopped_readers(rounds: int, seconds: float) -> Measured:
    """Measure the items/s of the fast readers beside stopped ones, against the same without them."""
    with driver(sys.executable, "request.rivals.peers", "serve", "plane") as server:
        beside, alone = in_fresh_process(_readers, announced(server), rounds, seconds)
    return Measured.against(beside, alone)


def _readers(address: str, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    return uvloop.run(_read(address, rounds, seconds))


async def _read(address: str, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Return the rounds of both. Each round measures both in both orders, in quick succession."""
    client = make_client(PlaneSettings.load())
    peer = PlanePeer(client, address)
    await _items_per_s(peer, seconds / 4)
    beside: list[float] = []
    alone: list[float] = []

    async def among_stopped() -> float:
        stopped = [await _stopped(client, address) for _ in range(STOPPED)]
        try:
            return await _items_per_s(peer, seconds / 2)
        finally:
            for stream in stopped:
                await stream.aclose()

    for number in range(rounds):
        first = await _items_per_s(peer, seconds / 2)
        beside.append((await among_stopped() + await among_stopped()) / 2)
        alone.append((first + await _items_per_s(peer, seconds / 2)) / 2)
        print(f"P15 round {number + 1}: {beside[-1]:,.0f} against {alone[-1]:,.0f} items/s", flush=True)
    await client.aclose()
    return beside, alone


async def _stopped(client: RequestPlaneClient, address: str) -> ResponseStream:
    """Ask for an endless answer, read its first item, and read no more."""
    stream = client.open(target(address, "tick"), _ENDLESS, None)
    await anext(stream)
    return stream


async def _items_per_s(peer: PlanePeer, seconds: float) -> float:
    began = time.perf_counter()
    answers = await peer.drive(_FAST_READERS, seconds)
    return len(answers) * ITEMS / (time.perf_counter() - began)
