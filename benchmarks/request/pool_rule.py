"""Measures when a second connection to the same instance helps.

    python -m benchmarks.request.pool_rule [--rounds 5] [--seconds 1.0] [--only NAME]

Client and server run in separate processes on uvloop. `spread-N` sends the same load over N connections.
`beside-…` sends small requests (200 B, 8 callers, each pausing 2 ms) while 2 callers move large payloads
without a pause, in one of three ways: over *one* connection, with the small requests on connections *apart*
(which no pool can know beforehand), and through the *pool* as it is. It prints the medians over all rounds,
which alternate between the variants.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

import uvloop

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer

SECRET: Final = b"benchmark" * 4
MIB: Final = 1 << 20
SMALL: Final = b"x" * 200
SMALL_CALLERS: Final = 8
SMALL_PAUSE_S: Final = 0.002
LARGE_CALLERS: Final = 2
ITEMS: Final = 200


@dataclass(frozen=True)
class Figure:
    """One round of one variant: calls a second, latency, CPU of both processes, open connections."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    connections: int = 1


class Server:
    """The serving process, as this process sees it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        self.address: str = self._pipe.recv()

    def cpu_s(self) -> float:
        """Return the CPU seconds of both processes so far."""
        self._pipe.send("cpu")
        return float(self._pipe.recv()) + _cpu_s()

    def target(self, subject: str) -> Target:
        """Return the target of a request for `subject`."""
        return Target(1, self.address, subject, SECRET)

    def stop(self) -> None:
        """End the process."""
        self._pipe.send("stop")
        self._process.join(10)


async def _echo(request: Any, _: Context) -> Any:
    return request


async def _small(request: Any, _: Context) -> Any:
    return request


async def _length(request: bytes, _: Context) -> int:
    return len(request)


async def _bytes(request: int, _: Context) -> bytes:
    return bytes(request)


async def _tick(request: int, _: Context) -> AsyncIterator[bytes]:
    for _i in range(request):
        await asyncio.sleep(0)
        yield SMALL


def _serve(pipe: Connection) -> None:
    async def main() -> None:
        server = TcpServer(PlaneSettings(), secret=SECRET, instance_id=1)
        for handler in (_echo, _small, _length, _bytes, _tick):
            server.register(handler.__name__.removeprefix("_"), handler)
        await server.start()
        loop = asyncio.get_running_loop()
        pipe.send(server.address)
        while await loop.run_in_executor(None, pipe.recv) == "cpu":
            pipe.send(_cpu_s())
        await server.aclose()

    uvloop.run(main())


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def _call(client: TcpClient, target: Target, request: Any) -> None:
    async for _ in client.open(target, request, None):
        pass


async def _repeat(
    client: TcpClient, target: Target, request: Any, until: float, pause_s: float = 0.0
) -> list[float]:
    """Call again and again, one call after the other, until a time (`perf_counter`), with a pause between
    two calls. Returns the seconds of each call."""
    latencies = []
    while (began := time.perf_counter()) < until:
        await _call(client, target, request)
        latencies.append(time.perf_counter() - began)
        if pause_s:
            await asyncio.sleep(pause_s)
    return latencies


def _figure(
    latencies: list[float], seconds: float, cpu_s: float, connections: int, *, paced: bool = False
) -> Figure:
    """Return the figure of one round. CPU time a call is 0 for paced calls: it is that of the other load."""
    latencies.sort()
    count = len(latencies)
    return Figure(
        per_s=count / seconds,
        p50_ms=latencies[count // 2] * 1e3,
        p99_ms=latencies[count * 99 // 100] * 1e3,
        cpu_us=0.0 if paced else cpu_s / count * 1e6,
        connections=connections,
    )


async def spread(server: Server, seconds: float, *, connections: int, load: tuple[str, Any, int]) -> Figure:
    """Measure the same load over a fixed number of connections."""
    subject, request, callers = load
    clients = [TcpClient(PlaneSettings(pool_size=1)) for _ in range(connections)]
    target = server.target(subject)
    await asyncio.gather(*(_call(client, target, request) for client in clients))
    cpu_s, began = server.cpu_s(), time.perf_counter()
    parts = await asyncio.gather(
        *(
            _repeat(clients[number % connections], target, request, began + seconds)
            for number in range(callers)
        )
    )
    took, cpu_s = time.perf_counter() - began, server.cpu_s() - cpu_s
    for client in clients:
        await client.aclose()
    return _figure([one for part in parts for one in part], took, cpu_s, connections)


async def beside(server: Server, seconds: float, *, how: str, what: tuple[str, Any]) -> Figure:
    """Measure small requests beside large ones; `per_s` counts the large."""
    subject, request = what
    pool_size = {"pool": None, "apart": 1, "one": 1}[how]
    settings = PlaneSettings.load(pool_size=pool_size)
    for_large = TcpClient(settings)
    for_small = TcpClient(settings) if how == "apart" else for_large
    small, large = server.target("small"), server.target(subject)
    await _call(for_small, small, SMALL)
    for _ in range(2):
        await _call(for_large, large, request)
    began = time.perf_counter()
    until = began + seconds
    large_ones = [
        asyncio.ensure_future(_repeat(for_large, large, request, until)) for _ in range(LARGE_CALLERS)
    ]
    small_ones = await asyncio.gather(
        *(_repeat(for_small, small, SMALL, until, SMALL_PAUSE_S) for _ in range(SMALL_CALLERS))
    )
    count = sum([len(await one) for one in large_ones])
    took = time.perf_counter() - began
    connections = len({for_small, for_large}) if how == "apart" else for_large.connection_count
    for client in {for_small, for_large}:
        await client.aclose()
    figure = _figure([one for part in small_ones for one in part], took, 0.0, connections, paced=True)
    return Figure(count / took, figure.p50_ms, figure.p99_ms, 0.0, connections)


_Variant = Callable[[Server, float], Awaitable[Figure]]


def _variants() -> dict[str, dict[str, _Variant]]:
    loads: dict[str, tuple[str, Any, int]] = {
        "unary c=1": ("echo", SMALL, 1),
        "unary c=64": ("echo", SMALL, 64),
        "unary c=256": ("echo", SMALL, 256),
        "streams c=32": ("tick", ITEMS, 32),
        "echo 1 MiB c=4": ("echo", bytes(MIB), 4),
        "echo 8 MiB c=4": ("echo", bytes(8 * MIB), 4),
    }
    suites: dict[str, dict[str, _Variant]] = {}
    for name, load in loads.items():
        suites[f"spread {name}"] = {
            f"{count} connections": partial(spread, connections=count, load=load) for count in (1, 2, 4)
        }
    for size in (1, 8, 32):
        large: dict[str, tuple[str, Any]] = {
            f"echo {size} MiB": ("echo", bytes(size * MIB)),
            f"upload {size} MiB": ("length", bytes(size * MIB)),
            f"download {size} MiB": ("bytes", size * MIB),
        }
        for name, what in large.items():
            suites[f"beside {name}"] = {
                how: partial(beside, how=how, what=what) for how in ("one", "apart", "pool")
            }
    return suites


async def _run(server: Server, only: str, rounds: int, seconds: float) -> None:
    for suite, variants in _variants().items():
        if only not in suite:
            continue
        figures: dict[str, list[Figure]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, variant in variants.items():
                figures[name].append(await variant(server, seconds))
        print(suite)
        for name, found in figures.items():
            print(f"  {name:14} {_summary(found)}", flush=True)


def _summary(found: list[Figure]) -> str:
    def median(field: str) -> float:
        return float(statistics.median(getattr(figure, field) for figure in found))

    cpu = f"   CPU {median('cpu_us'):8.1f} µs a call" if median("cpu_us") else ""
    return (
        f"{median('per_s'):10,.1f} /s   p50 {median('p50_ms'):7.2f} ms   p99 {median('p99_ms'):7.2f} ms"
        f"{cpu}   {median('connections'):.0f} open"
    )


def main() -> None:
    """Run the chosen comparisons and print a line for each variant."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request.pool_rule",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each variant (default 5)")
    parser.add_argument("--only", default="", help="part of a comparison's name")
    arguments = parser.parse_args()
    server = Server()
    try:
        uvloop.run(_run(server, arguments.only, arguments.rounds, arguments.seconds))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
