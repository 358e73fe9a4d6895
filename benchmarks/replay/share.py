"""X10: the part of an omniscient router's hit rate that real routers get from the trace.

Each round replays the whole trace through real processes, with other Poisson arrivals, and simulates the
omniscient router on the same requests, engines and caches. Chance among equal workers moves the hit rate of
either by several per cent. So both draw it alike for each request, and a round's ratio shows the other
differences. Short runs would not do: while the caches fill, one choice can decide where much of the trace
goes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.harness.report import Measured
from benchmarks.replay.figures import figures
from benchmarks.replay.plan import Plan
from benchmarks.replay.run import RunResult, run
from benchmarks.replay.simulation import Omniscient, simulate
from dynamo_redis.store.server import EmbeddedServer

REQUESTS: Final = 12_031
"""The whole trace."""
LOAD: Final = 0.7
WORKERS: Final = 16
KV_BLOCKS: Final = 2048
"""Blocks of a worker: so few that blocks are evicted from the thousandth request on."""
SPEEDUP: Final = 10.0

LARGEST_LATENESS_S: Final = 0.1
"""Largest delay of requests, real time, 99th percentile. On a machine that falls behind queues arise, and
queues make hits."""


def share(rounds: int) -> dict[str, Measured]:
    """Measure X10 with one router. Raises RuntimeError if its index was not equal to the caches at the end,
    or if this machine did not keep up with the trace."""
    ours: list[float] = []
    omniscient: list[float] = []
    for number in range(rounds):
        plan = Plan(
            trace=None,
            requests=REQUESTS,
            arrivals="poisson",
            load=LOAD,
            seed=number,
            workers=WORKERS,
            kv_blocks=KV_BLOCKS,
            speedup=SPEEDUP,
        )
        omniscient.append(figures(simulate(plan, Omniscient, seed=plan.seed), WORKERS).hit_rate)
        result = uvloop.run(_run(plan))
        if not all(one.equal for one in result.differences):
            raise RuntimeError(f"the index does not equal the caches: {result.differences}")
        if result.late_s > LARGEST_LATENESS_S:
            raise RuntimeError(f"this machine is too busy: requests were sent {result.late_s:.2f} s late")
        ours.append(figures(result.outcomes, WORKERS).hit_rate)
        trace = plan.load_trace().name
        print(f"X10 round {number + 1}, {trace}: {ours[-1]:.4f}, omniscient {omniscient[-1]:.4f}", flush=True)
    return {"X10": Measured.against(ours, omniscient)}


async def _run(plan: Plan) -> RunResult:
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(Path(directory), port=0) as server:
            return await run(plan, server)
