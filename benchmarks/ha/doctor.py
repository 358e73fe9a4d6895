"""`dynamo-redis doctor` on a healthy server."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.harness.processes import redis_server
from benchmarks.harness.report import Measured


def doctor_runs(rounds: int) -> dict[str, Measured]:
    """Measure H6, in s: the whole command, from the start of its process to its end. The worst round counts;
    one before the first writes the bytecode. Raises RuntimeError if a check fails or warns."""
    took: list[float] = []
    with redis_server() as server:
        command = [sys.executable, "-m", "dynamo_redis", "doctor", server.url]
        for number in range(rounds + 1):
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            took.append(time.perf_counter() - started)
            if done.returncode or "warn" in done.stdout:
                raise RuntimeError(f"doctor ended with {done.returncode}: {done.stdout}{done.stderr}")
            print(f"H6 round {number}: {took[-1]:.2f} s", flush=True)
    return {"H6": Measured(round(max(took[1:]), 3), None, None, rounds)}
