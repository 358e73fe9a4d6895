"""R1 and R2: from a put until 100 connections have seen it, ours against etcd and against bare streams.

Four processes have 25 watches each, every one on connections of its own and with a lease; one writer puts at
a fixed rate. The three sides take turns, each with fresh processes, so that no side's idle processes disturb
another. All run on uvloop, all carry the same values.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack

from benchmarks.harness.processes import driver, redis_server
from benchmarks.harness.report import Measured
from benchmarks.registry.etcd import etcd, etcd_python

PROCESSES = 4
WATCHES = 25
PUTS_PER_S = 25.0
SECONDS = 6.0
SETTLE_S = 1.0
LEAST_SEEN = 0.9
"""Part of the sent values that each watch must have seen. A round with less measured something else."""


def watching(rounds: int) -> dict[str, Measured]:
    """Measure R1 against etcd, R2 against the floor: p99 in ms."""
    p99: dict[str, list[float]] = {"ours": [], "etcd": [], "floor": []}
    with redis_server() as server, etcd() as etcd_address:
        addresses = {"ours": server.url, "etcd": etcd_address, "floor": server.url}
        for number in range(rounds):
            for side, address in addresses.items():
                p99[side].append(round_of(side, address))
            shown = ", ".join(f"{side} {times[-1]:.2f}" for side, times in p99.items())
            print(f"R1 R2 round {number + 1}: p99 from put to seen, ms: {shown}", flush=True)
    return {
        "R1": Measured.against(p99["ours"], p99["etcd"]),
        "R2": Measured.against(p99["ours"], p99["floor"]),
    }


def round_of(side: str, address: str) -> float:
    """Return the p99 over all deliveries of a round, in ms."""
    python = etcd_python() if side == "etcd" else sys.executable
    with ExitStack() as stack:
        processes = [
            stack.enter_context(driver(python, "registry.rivals.watchers", side, address, str(WATCHES)))
            for _ in range(PROCESSES)
        ]
        stack.enter_context(driver(python, "registry.rivals.writer", side, address, str(PUTS_PER_S)))
        for process in processes:
            process.answer()
        time.sleep(SETTLE_S)
        for process in processes:
            process.send("measure")
        time.sleep(SECONDS)
        for process in processes:
            process.send("answer")
        watches = [watch for process in processes for watch in json.loads(process.answer())]
    fewest = min(map(len, watches))
    if fewest < LEAST_SEEN * SECONDS * PUTS_PER_S:
        raise RuntimeError(f"a watch of {side} saw only {fewest} of {SECONDS * PUTS_PER_S:.0f} puts")
    times: list[float] = sorted(time_us / 1e3 for watch in watches for time_us in watch)
    middle, high = times[len(times) // 2], times[len(times) * 99 // 100]
    print(f"  {side}: {len(times)} deliveries, p50 {middle:.2f} ms, p99 {high:.2f} ms", flush=True)
    return high
