"""E4: time from the publication of an event until all of several routers have applied it.

A worker publishes stored blocks on a schedule, one an event. Routers run the indexer of a real router, each
in a process of its own. The time from the call of `stored` to the moment at which the last router has the
block in its index is measured. Meanwhile another process sends PINGs to the same server.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

from benchmarks.harness.processes import driver, redis_server
from benchmarks.harness.report import Measured
from dynamo_redis.config import EventSettings

EVENTS_PER_S = 5000
ROUTERS_COUNT = 4
ROUND_S = 3.0


def latency(rounds: int) -> dict[str, Measured]:
    """Measure E4: 99th percentiles in ms."""
    applied: list[float] = []
    floors: list[float] = []
    linger_ms = 1e3 * EventSettings.load().event_linger_s
    with redis_server() as server, ExitStack() as stack:
        environment = {"DYN_REDIS_URL": server.url, "DYN_REDIS_PREFIX": "bench-events"}
        worker, *others = (
            stack.enter_context(driver(sys.executable, f"events.rivals.{module}", environment=environment))
            for module in ("worker", *["router"] * ROUTERS_COUNT, "pings")
        )
        routers, pings = others[:-1], others[-1]
        for process in (worker, *others):
            process.answer()
        for number in range(-1, rounds):  # the first is a warm-up
            for process in (*routers, pings):
                process.send("begin")
                process.answer()
            worker.send(json.dumps([EVENTS_PER_S, ROUND_S if number >= 0 else 1.0]))
            published: dict[str, int] = json.loads(worker.answer())
            seen: list[dict[str, int]] = []
            for router in routers:
                router.send(str(len(published)))
                seen.append(json.loads(router.answer()))
            pings.send("end")
            ping_ms: float = json.loads(pings.answer())
            took_ms = sorted(
                (max(times[name] for times in seen) - at) / 1e6 for name, at in published.items()
            )
            if number < 0:
                continue
            applied.append(took_ms[len(took_ms) * 99 // 100])
            floors.append(ping_ms + linger_ms)
            print(
                f"E4 round {number + 1}: applied p50 {took_ms[len(took_ms) // 2]:.2f} ms,"
                f" p99 {applied[-1]:.2f} ms; PING p99 {ping_ms:.2f} ms; linger {linger_ms:g} ms",
                flush=True,
            )
    return {"E4": Measured.against(applied, floors)}
