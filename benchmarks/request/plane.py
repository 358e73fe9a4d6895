"""The tcp request plane by itself, client and server in separate processes, without rivals.

    python -m benchmarks.request.plane [--seconds 1] [--only unary-64] [--loop asyncio] [--profile]
    python -m benchmarks.request.plane --only idle

It serves those who work on the plane: one figure a workload, in a few seconds. The workloads are those of
`make bench SUITE=request`: unary echo of 128 bytes at 1, 64 and 256 at once; `burst`, answers of 200 × 100
bytes from a generator that never suspends, 32 at once; `tick`, the same with one turn of the event loop an
item; echo of 1 and 8 MiB. CPU seconds are both sides', for 100,000 requests or items. `idle` is the memory of
each of 1,000 connections that have had a request and have none now.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import multiprocessing
import pstats
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer

SECRET = b"benchmark" * 4
ITEMS = 200
ITEM = b"x" * 100
IDLE_COUNT = 1000


@dataclass(frozen=True)
class Workload:
    """Tasks as many as `concurrency` send `request` to `subject`; each answer counts `unit`."""

    name: str
    subject: str
    request: Any
    concurrency: int
    unit: int = 1


WORKLOADS = (
    Workload("unary-1", "echo", b"x" * 128, 1),
    Workload("unary-64", "echo", b"x" * 128, 64),
    Workload("unary-256", "echo", b"x" * 128, 256),
    Workload("burst", "burst", ITEMS, 32, ITEMS),
    Workload("tick", "tick", ITEMS, 32, ITEMS),
    Workload("echo-1MiB", "echo", bytes(1 << 20), 4),
    Workload("echo-8MiB", "echo", bytes(8 << 20), 2),
)


async def _echo(request: Any, _: Context) -> Any:
    return request


async def _burst(request: int, _: Context) -> AsyncIterator[bytes]:
    for _i in range(request):
        yield ITEM


async def _tick(request: int, _: Context) -> AsyncIterator[bytes]:
    for _i in range(request):
        await asyncio.sleep(0)
        yield ITEM


def _serve(pipe: Connection, runner: Callable[[Awaitable[None]], None], profile: bool) -> None:
    async def main() -> None:
        settings = PlaneSettings.load(tcp_host="0.0.0.0", tcp_advertise_host="127.0.0.1")
        server = TcpServer(settings, secret=SECRET, instance_id=1)
        for subject, handler in (("echo", _echo), ("burst", _burst), ("tick", _tick)):
            server.register(subject, handler)
        await server.start()
        loop = asyncio.get_running_loop()
        pipe.send(server.address)
        while (asked := await loop.run_in_executor(None, pipe.recv)) != "stop":
            pipe.send(_cpu_s() if asked == "cpu" else _resident_kib())
        await server.aclose()

    _profiled(lambda: runner(main()), "server" if profile else None)


async def _drive(
    client: TcpClient, target: Target, workload: Workload, seconds: float
) -> tuple[int, list[float]]:
    latencies: list[float] = []
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while (began := time.perf_counter()) < until:
            async for _item in client.open(target, workload.request, None):
                pass
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(caller() for _ in range(workload.concurrency)))
    return len(latencies), sorted(latencies)


async def _measure(address: str, pipe: Connection, workloads: list[Workload], seconds: float) -> None:
    client = TcpClient(PlaneSettings())
    for workload in workloads:
        target = Target(1, address, workload.subject, SECRET)
        await _drive(client, target, workload, seconds / 5)
        pipe.send("cpu")
        before, began = _cpu_s() + pipe.recv(), time.perf_counter()
        count, latencies = await _drive(client, target, workload, seconds)
        took = time.perf_counter() - began
        pipe.send("cpu")
        cpu_s = _cpu_s() + pipe.recv() - before
        per_s = count * workload.unit / took
        print(
            f"{workload.name:10} {per_s:12,.0f} /s   p50 {latencies[count // 2] * 1e3:7.2f} ms   "
            f"p99 {latencies[count * 99 // 100] * 1e3:7.2f} ms   "
            f"CPU {cpu_s / (count * workload.unit) * 1e5:7.2f} s/100k"
        )
    await client.aclose()


async def _idle(address: str, pipe: Connection) -> None:
    """Open a connection to each of many addresses of the loopback network; print the memory of each on both
    sides."""
    client, port = TcpClient(PlaneSettings()), address.rsplit(":", 1)[1]
    targets = [
        Target(1, f"127.0.{1 + number // 250}.{1 + number % 250}:{port}", "echo", SECRET)
        for number in range(IDLE_COUNT)
    ]

    async def resident_kib() -> tuple[int, int]:
        await asyncio.sleep(2 * PlaneSettings().keepalive_interval_s)  # until the sweeps have ended
        pipe.send("resident")
        return _resident_kib(), pipe.recv()

    async def ask(targets: list[Target]) -> None:
        for target in targets:
            assert [item async for item in client.open(target, b"x", None)] == [b"x"]

    await ask(targets[:10])
    before = await resident_kib()
    await ask(targets[10:])
    after = await resident_kib()
    ours, theirs = ((a - b) / (IDLE_COUNT - 10) for a, b in zip(after, before, strict=True))
    print(f"{'idle':10} {ours:12.1f} KiB a connection at the caller, {theirs:.1f} at the worker")
    await client.aclose()


def _resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _profiled(work: Callable[[], None], title: str | None) -> None:
    if title is None:
        work()
        return
    profiler = cProfile.Profile()
    profiler.runcall(work)
    print(f"--- {title}")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Run the chosen workloads and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request.plane",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a workload (default 1)")
    parser.add_argument("--only", action="append", help="a workload's name; repeat for several")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--profile", action="store_true", help="profile both sides")
    arguments = parser.parse_args()
    runner = uvloop.run if arguments.loop == "uvloop" else asyncio.run
    workloads = [w for w in WORKLOADS if not arguments.only or w.name in arguments.only]
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, runner, arguments.profile), daemon=True
    )
    process.start()
    address = ours.recv()
    if workloads:
        _profiled(
            lambda: runner(_measure(address, ours, workloads, arguments.seconds)),
            "client" if arguments.profile else None,
        )
    if not arguments.only or "idle" in arguments.only:
        runner(_idle(address, ours))
    ours.send("stop")
    process.join(10)


if __name__ == "__main__":
    main()
