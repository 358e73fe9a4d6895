"""Ten minutes of requests through real workers and routers, while parts are killed and come back. Memory must
stay flat, and every router's index must equal the workers' caches at the end.

Conversations are made up, without an end, and caches so small that blocks are evicted all the time. Routers
store their index, and trim the stream, after each few thousand events. In turn a worker, Redis and a router
are killed (kill -9) and started again. Memory is that of a worker process and a router that live from the
beginning to the end, that of Redis's data, and the router's blocks. It is flat if the median over the last
quarter of the time is at most a tenth, or 6 MiB (500 blocks), above that over the second. A run of less than
two minutes is all warm-up, and its memory is not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.progress import Progress

from benchmarks.harness.options import length_s
from benchmarks.harness.report import RESULTS, machine
from benchmarks.replay.figures import figures
from benchmarks.replay.plan import Plan
from benchmarks.replay.run import Deployment, Fault, RunResult
from dynamo_redis.errors import StoreError
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer

PATH: Final = RESULTS / "soak.json"
REQUESTS_PER_S: Final = 30
"""Requests a second, in real time."""
FAULTS: Final[tuple[Fault, ...]] = ("worker", "redis", "router")
FAULT_EVERY_S: Final = 30.0
FAULTS_BETWEEN: Final = (0.1, 0.85)
"""First and last time of a fault, as parts of the run."""
SNAPSHOT_EVENTS: Final = 2000
SHORTEST_S: Final = 120.0
"""Shortest run whose memory is judged, in seconds."""
FLAT_RATIO: Final = 1.1
FLAT_SLACK: Final = {"worker_bytes": 6 << 20, "router_bytes": 6 << 20, "redis_bytes": 6 << 20, "blocks": 500}

_SAMPLE_S: Final = 2.0
_REDIS_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of all that must not grow. 0 stands for a value that could not be read at that moment."""

    after_s: float
    worker_bytes: int
    router_bytes: int
    redis_bytes: int
    """Memory of Redis's keys and values."""
    blocks: int
    """Blocks in that router's index."""


def growth(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Return the medians of each measured value over the second and the last quarter of the time."""
    end_s = samples[-1].after_s

    def median(name: str, begin: float, end: float) -> float:
        values = [getattr(one, name) for one in samples if begin * end_s <= one.after_s <= end * end_s]
        return float(statistics.median(value for value in values if value))

    return {name: (median(name, 0.25, 0.5), median(name, 0.75, 1.0)) for name in FLAT_SLACK}


def grown(medians: dict[str, tuple[float, float]]) -> list[str]:
    """Return the names of the values that did not stay flat."""
    return [
        name
        for name, (early, late) in medians.items()
        if late > max(FLAT_RATIO * early, early + FLAT_SLACK[name])
    ]


def make_plan(seconds: float, seed: int) -> Plan:
    """Return a plan with the requests of that time, at a speed that matches it."""
    plan = Plan(
        trace=None,
        workload="made-up",
        requests=int(REQUESTS_PER_S * seconds),
        arrivals="poisson",
        load=0.5,
        seed=seed,
        workers=8,
        kv_blocks=256,
        replicas=2,
        snapshot_threshold=SNAPSHOT_EVENTS,
    )
    return replace(plan, speedup=plan.load_trace().requests[-1].arrival_s / seconds)


def make_faults(seconds: float) -> list[tuple[float, Fault]]:
    """Return faults of each kind in turn, one every half minute, and each kind at least once."""
    count = max(len(FAULTS), int(seconds / FAULT_EVERY_S))
    first, last = FAULTS_BETWEEN
    kinds = itertools.cycle(FAULTS)
    return [(first + (last - first) * number / (count - 1), next(kinds)) for number in range(count)]


async def _sample(deployment: Deployment, samples: list[Sample]) -> None:
    """Take a sample every other second, until cancelled, of the processes that are never killed."""
    began = time.monotonic()
    client = RedisClient(deployment.server.url, timeout_s=_REDIS_TIMEOUT_S, client_name="soak")
    try:
        while True:
            await asyncio.sleep(_SAMPLE_S)
            samples.append(
                Sample(
                    after_s=round(time.monotonic() - began, 1),
                    worker_bytes=deployment.workers[-1].resident_bytes(),
                    router_bytes=deployment.routers[-1].resident_bytes(),
                    redis_bytes=await _redis_bytes(client),
                    blocks=deployment.reports.get(deployment.plan.replicas - 1, {}).get("blocks", 0),
                )
            )
    finally:
        await client.aclose()


async def _redis_bytes(client: RedisClient) -> int:
    with suppress(StoreError):
        for line in (await client.execute("INFO", "memory")).decode().splitlines():
            if line.startswith("used_memory_dataset:"):
                return int(line.partition(":")[2])
    return 0


async def soak(seconds: float, seed: int) -> tuple[Plan, RunResult, list[Sample]]:
    """Run for `seconds`. Returns the plan, the result and the samples."""
    plan = make_plan(seconds, seed)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as directory, Progress() as progress:
        task = progress.add_task("requests", total=plan.requests)
        async with (
            EmbeddedServer(Path(directory), port=0) as server,
            Deployment(plan, server, faults=make_faults(seconds)) as deployment,
        ):
            sampling = asyncio.create_task(_sample(deployment, samples))
            try:
                result = await deployment.replay(lambda count: progress.update(task, completed=count))
            finally:
                sampling.cancel()
                await asyncio.wait([sampling])
    return plan, result, samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print and save the result; return 1 if a value grew or an index was not equal."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=length_s, default=10.0, help="length in minutes [10]")
    parser.add_argument("--seed", type=int, default=1, help="seed of requests and their arrivals [1]")
    parser.add_argument("--results", type=Path, default=PATH, metavar="FILE", help="file for the figures")
    given = parser.parse_args(arguments)
    seconds = 60 * given.minutes
    plan, result, samples = uvloop.run(soak(seconds, given.seed))
    found = summary(plan, result, samples, make_faults(seconds))
    for name, value in found.items():
        if name != "samples":
            print(f"{name:>16}  {value}")
    given.results.parent.mkdir(exist_ok=True)
    given.results.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["index"] == "equal" and not found["grown"] else 1


def summary(
    plan: Plan, result: RunResult, samples: Sequence[Sample], faults: Sequence[tuple[float, Fault]]
) -> dict[str, Any]:
    """Return the result for JSON."""
    long_enough = bool(samples) and samples[-1].after_s >= SHORTEST_S
    medians = growth(samples) if long_enough else {}
    unequal = [asdict(one) for one in result.differences if not one.equal]
    return {
        "minutes": round(result.length_s / 60, 1),
        "requests": plan.requests,
        "failed": result.failed,
        "lost": result.lost_count,
        "killed": [f"{fault} at {part:.0%}" for part, fault in faults],
        "events_per_s": round(result.events_count / result.length_s),
        "hit_rate": round(figures(result.outcomes, plan.workers).hit_rate, 4),
        "index": unequal or "equal",
        "equal_after_s": round(result.quiet_s, 1),
        "second_to_last_quarter": medians or "too short to tell",
        "grown": grown(medians),
        "machine": machine(),
        "samples": [asdict(one) for one in samples],
    }


if __name__ == "__main__":
    sys.exit(main())
