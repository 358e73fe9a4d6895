"""A flame graph of our frontend under the load of row F1, and the CPU time of its parts.

`python -m benchmarks.frontend.flame` writes `results/frontend_flame.svg` with py-spy, and prints the table
"where the time goes" for the README. py-spy reads another process's memory: that takes root, or
`kernel.yama.ptrace_scope` 0. Processes of the frontend's own, for templates and for large bodies, are
included.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Final

from benchmarks.frontend.caller import Load
from benchmarks.frontend.prompts import MODEL, model_directory
from benchmarks.frontend.sides import Figures, Side, callers, ours
from benchmarks.harness.options import length_s
from benchmarks.harness.processes import Driver, rival_python
from benchmarks.harness.report import RESULTS

GRAPH: Final = RESULTS / "frontend_flame.svg"
SAMPLES_PER_S: Final = 500
AROUND_S: Final = 3.0
"""Seconds of load before and after the samples are taken."""

GROUPS: Final = (
    ("template", r"dynamo_redis/(templates/|models/chat_template|jobs/)"),
    ("tokenize", r"\b(encode|tokenize)\b.* \(dynamo_redis/frontend/|dynamo_redis/frontend/tokenizing"),
    ("detokenize", r"dynamo_redis/frontend/(tokens|answers)"),
    ("SSE", r"dynamo_redis/frontend/(http/sse|openai)"),
    ("plane", r"dynamo_redis/(planes|wire|runtime|router)/"),
    ("HTTP", r"dynamo_redis/frontend/http/"),
    ("rest of the frontend", r"dynamo_redis/frontend/"),
    ("event loop", ""),
)
"""Groups of frames. A sample belongs to the group of its innermost frame that has one."""


def main() -> None:
    """Write the graph, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontend.flame", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=length_s, default=10.0, help="length of each recording (default 10)"
    )
    seconds = parser.parse_args().seconds
    with model_directory() as model, callers(model) as caller, ours(model) as side:
        record(side, caller, "flamegraph", GRAPH, seconds)
        print(f"wrote {GRAPH}", flush=True)
        raw = model.with_name("stacks.txt")
        figures = record(side, caller, "raw", raw, seconds)
        shares = shares_of(raw.read_text())
    frontend_ms = figures.cpu_ms("frontend")
    print(f"\nfrontend: {frontend_ms:.2f} ms of CPU a request, at {figures.per_s:.0f} requests/s\n")
    print("| part of the frontend | share | ms a request |\n|---|---|---|")
    for group, _ in GROUPS:
        print(f"| {group} | {100 * shares[group]:.0f} % | {shares[group] * frontend_ms:.2f} |")


def record(side: Side, caller: Driver, form: str, path: Path, seconds: float) -> Figures:
    """Record the frontend under load, in a form of py-spy; return the figures of the load."""
    spy = Path(rival_python("py-spy", "py-spy")).with_name("py-spy")
    command = [spy, "record", "--pid", str(side.pids("frontend")[0]), "--subprocesses", "--format", form]
    command += ["--rate", str(SAMPLES_PER_S), "--duration", f"{seconds:.0f}", "--output", path]
    recorder = threading.Timer(
        AROUND_S, subprocess.run, [command], {"check": True, "stdout": subprocess.DEVNULL}
    )
    recorder.start()
    load = Load(port=side.port, model=MODEL, seconds=seconds + 2 * AROUND_S)
    figures = side.measure(caller, load)
    recorder.join()
    return figures


def shares_of(stacks: str) -> dict[str, float]:
    """Return each group's share of the samples. `stacks` has a line for each stack, the outermost frame
    first, and its count."""
    counts: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        counts[group_of(stack.split(";"))] += int(count)
    total = counts.total() or 1
    return {group: counts[group] / total for group, _ in GROUPS}


def group_of(frames: list[str]) -> str:
    """Return the group of a stack."""
    for frame in reversed(frames):
        for group, pattern in GROUPS:
            if pattern and re.search(pattern, frame):
                return group
    return GROUPS[-1][0]


if __name__ == "__main__":
    main()
