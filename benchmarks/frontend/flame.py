"""A flame graph of our frontend under the load of row F1, and the CPU time of its parts.

`python -m benchmarks.frontend.flame` writes `results/frontend_flame.svg` with py-spy, and the table of the
parts into the README. With `--paced` the load is that of row F5, and the graph
`results/frontend_flame_paced.svg`. py-spy reads another process's memory: that takes root, or
`kernel.yama.ptrace_scope` 0. It records the frontend's own process; the CPU time of its children, which
render the templates that it does not, is that of the kernel. py-spy stops the process for each sample, so
figures in ms are higher than those of the rows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.frontend.caller import Load
from benchmarks.frontend.paced import LOAD, OUR_PACE
from benchmarks.frontend.prompts import MODEL, model_directory
from benchmarks.frontend.sides import (
    STEP_APART,
    Figures,
    Side,
    callers,
    our_frontend,
    our_workers,
    tree_cpu_s,
)
from benchmarks.harness.options import length_s
from benchmarks.harness.processes import Driver, rival_python
from benchmarks.harness.report import RESULTS

GRAPH: Final = RESULTS / "frontend_flame.svg"
README: Final = RESULTS.parent / "README.md"
PACED_GRAPH: Final = RESULTS / "frontend_flame_paced.svg"
SAMPLES_PER_S: Final = 500
AROUND_S: Final = 3.0
"""Seconds of load before and after the samples are taken."""

CHILDREN: Final = "template: its process"
GROUPS: Final = (
    ("template: rendering", r"dynamo_redis/(templates/|models/chat_template|jobs/)"),
    ("tokenize", r"\b(encode|tokenize)\b.* \(dynamo_redis/frontend/|dynamo_redis/frontend/tokenizing"),
    ("detokenize", r"dynamo_redis/frontend/(tokens|answers)"),
    ("SSE and its writes to sockets", r"EventResponse\.|dynamo_redis/frontend/(http/sse|forms/)"),
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
    parser.add_argument("--paced", action="store_true", help="the load of row F5 instead of F1's")
    parser.add_argument(
        "--seconds", type=length_s, default=10.0, help="length of each recording (default 10)"
    )
    arguments = parser.parse_args()
    load: Mapping[str, Any] = LOAD if arguments.paced else {}
    load = {**load, "seconds": arguments.seconds + 2 * AROUND_S}
    with ExitStack() as stack:
        model = stack.enter_context(model_directory())
        caller = stack.enter_context(callers(model))
        pace = OUR_PACE if arguments.paced else ("--speedup-ratio", STEP_APART)
        side = stack.enter_context(our_frontend(stack.enter_context(our_workers(model, *pace))))
        graph = PACED_GRAPH if arguments.paced else GRAPH
        record(side, caller, load, "flamegraph", graph, arguments.seconds)
        print(f"wrote {graph}", flush=True)
        raw = model.with_name("stacks.txt")
        process = psutil.Process(side.pids("frontend")[0])
        own, all_s = own_cpu_s(process), tree_cpu_s(process)
        figures = record(side, caller, load, "raw", raw, arguments.seconds)
        own_share = (own_cpu_s(process) - own) / (tree_cpu_s(process) - all_s)
        stacks = raw.read_text()
    table = table_of(shares_of(stacks), own_share, figures)
    print(f"\n{table}")
    mark = "paced parts" if arguments.paced else "parts"
    page = README.read_text()
    README.write_text(
        re.sub(f"(<!-- {mark} -->\n).*(<!-- /{mark} -->)", rf"\1{table}\2", page, flags=re.DOTALL)
    )
    print("\nby innermost function of this package:")
    for function, share in heaviest(stacks):
        print(f"{100 * share:5.1f} %  {function}")


def record(
    side: Side, caller: Driver, load: Mapping[str, Any], form: str, path: Path, seconds: float
) -> Figures:
    """Record the frontend under a load, in a form of py-spy; return the figures of the load."""
    spy = Path(rival_python("py-spy", "py-spy")).with_name("py-spy")
    command = [spy, "record", "--pid", str(side.pids("frontend")[0]), "--format", form]
    command += ["--rate", str(SAMPLES_PER_S), "--duration", f"{seconds:.0f}", "--output", path]
    recorder = threading.Timer(
        AROUND_S, subprocess.run, [command], {"check": True, "stdout": subprocess.DEVNULL}
    )
    recorder.start()
    figures = side.measure(caller, Load(port=side.port, model=MODEL, **load))
    recorder.join()
    return figures


def own_cpu_s(process: psutil.Process) -> float:
    """Return the user and system time of a process, without its children."""
    times = process.cpu_times()
    return float(times.user + times.system)


def table_of(shares: Mapping[str, float], own_share: float, figures: Figures) -> str:
    """Return the parts as a table in Markdown. `shares` are of the frontend's own process, which uses
    `own_share` of the CPU time; its children use the rest, for templates."""
    frontend_ms = figures.cpu_ms("frontend")
    parts = {CHILDREN: 1 - own_share} | {group: own_share * shares[group] for group, _ in GROUPS}
    lines = ["| part of the frontend | share | ms a request |", "|---|---|---|"]
    for part, share in parts.items():
        lines.append(f"| {part} | {100 * share:.0f} % | {share * frontend_ms:.2f} |")
    lines.append(f"| all, at {figures.per_s:.0f} requests/s | 100 % | {frontend_ms:.2f} |")
    return "".join(f"{line}\n" for line in lines)


def shares_of(stacks: str) -> dict[str, float]:
    """Return each group's share of the samples. `stacks` has a line for each stack, the outermost frame
    first, and its count."""
    counts: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        counts[group_of(stack.split(";"))] += int(count)
    total = counts.total() or 1
    return {group: counts[group] / total for group, _ in GROUPS}


def heaviest(stacks: str, count: int = 15) -> list[tuple[str, float]]:
    """Return the functions of this package with the most samples of their own, without those that they call
    in this package, and their shares."""
    counts: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, samples = line.rpartition(" ")
        ours = [frame for frame in stack.split(";") if "dynamo_redis/" in frame]
        counts[re.sub(r":\d+\)$", ")", ours[-1]) if ours else "none"] += int(samples)
    total = counts.total() or 1
    return [(function, samples / total) for function, samples in counts.most_common(count)]


def group_of(frames: list[str]) -> str:
    """Return the group of a stack."""
    for frame in reversed(frames):
        for group, pattern in GROUPS:
            if pattern and re.search(pattern, frame):
                return group
    return GROUPS[-1][0]


if __name__ == "__main__":
    main()
