"""One process of one side of suite `request`.

`python -m benchmarks.request.rivals.peers serve MODULE [ARGUMENT…]` serves, and says `ready ADDRESS`. `python
-m benchmarks.request.rivals.peers call MODULE [ARGUMENT…]` calls it, and says `ready`; then it answers each
line of JSON, `[WORKLOAD, SECONDS]`, by one: the number of answers, the seconds in which they came, the CPU
seconds of this process, and the median and the 99th percentile of the time of an answer, in ms.

Both end with their standard input.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from importlib import import_module
from typing import Any

import uvloop

from benchmarks.request.rivals.peer import Peer
from benchmarks.request.workloads import WORKLOADS

PATIENCE = 10.0
"""A load that takes this many times longer than asked for counts as hanging."""
PATIENCE_S = 60.0


def announce(address: str) -> None:
    """Tell the suite the address of this process."""
    print("ready", address, flush=True)


async def measure(peer: Peer, name: str, seconds: float) -> dict[str, float]:
    """Put one workload on. Raises TimeoutError, WrongAnswer."""
    gc.collect()
    began, cpu = time.perf_counter(), time.process_time()
    async with asyncio.timeout(PATIENCE * seconds + PATIENCE_S):
        latencies = await peer.drive(WORKLOADS[name], seconds)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    latencies.sort()
    count = len(latencies)
    return {
        "count": count,
        "seconds": took,
        "cpu_s": cpu,
        "p50_ms": 1e3 * latencies[count // 2],
        "p99_ms": 1e3 * latencies[count * 99 // 100],
    }


async def serve(module: Any, arguments: list[str]) -> None:
    """Serve until standard input ends."""
    serving = asyncio.ensure_future(module.serve(announce, *arguments))
    reading = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait((serving, reading), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()


async def call(module: Any, arguments: list[str]) -> None:
    """Answer the suite's lines until the input ends."""
    async with asyncio.timeout(PATIENCE_S):
        peer: Peer = await module.connect(*arguments)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await measure(peer, *json.loads(line))), flush=True)


async def main(role: str, name: str, *arguments: str) -> None:
    """Run as one process of a side."""
    module = import_module(f"benchmarks.request.rivals.{name}")
    await (serve if role == "serve" else call)(module, list(arguments))
    # The process needs no clean-up, and some of the libraries have threads that outlive the loop.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
