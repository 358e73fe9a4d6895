"""Suite `planes`: the request planes against each other, and against what else does the same work.

All sides stand ready and take turns, workload by workload and round by round, as in suite `request`.
`--rows N1,N3` measures what these rows need.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import traceback
from contextlib import ExitStack
from typing import Final

from rich.console import Console
from rich.table import Table

from benchmarks.harness.options import length_s, rounds_count
from benchmarks.harness.report import Measured, Row, median, report
from benchmarks.planes.sides import (
    DYNAMO_NATS_RUNTIME,
    HTTP,
    HYPERCORN,
    LAST_RELEASE,
    NATS,
    NATS_PY,
    OUR_NATS_RUNTIME,
    REDIS,
    SIDES,
    TCP,
)
from benchmarks.request.sides import Figures, Side
from benchmarks.request.workloads import WORKLOADS

BOUNDS: Final[dict[str, tuple[str, float, float]]] = {
    "N1": ("http unary c=64 ÷ hypercorn + httpx on the same work", 1.5, 3),
    "N2": ("http tick ÷ hypercorn + httpx", 1.0, 2),
    "N3": ("nats plane unary c=64 ÷ bare nats-py request/reply", 0.8, 1.0),
    "N4": ("nats plane tick ÷ bare nats-py streamed replies", 1.0, 3),
    "N5": ("redis plane unary c=64 ÷ nats plane", 0.5, 1.0),
    "N6": ("redis plane tick ÷ nats plane", 0.7, 1.5),
    "N7": ("tcp plane ÷ tcp plane of the last release, unary c=64 and tick, worse of the two", 0.95, 1.0),
    "N8": ("nats plane unary c=64 ÷ Dynamo 1.6.1 on its nats plane, runtime API on both", 5, 10),
}
"""Text, bound (`must`) and aim of each row."""

_COMPARED: Final[dict[str, tuple[tuple[str, str, str], ...]]] = {
    "N1": (("unary c=64", HTTP, HYPERCORN),),
    "N2": (("tick", HTTP, HYPERCORN),),
    "N3": (("unary c=64", NATS, NATS_PY),),
    "N4": (("tick", NATS, NATS_PY),),
    "N5": (("unary c=64", REDIS, NATS),),
    "N6": (("tick", REDIS, NATS),),
    "N7": (("unary c=64", TCP, LAST_RELEASE), ("tick", TCP, LAST_RELEASE)),
    "N8": (("unary c=64", OUR_NATS_RUNTIME, DYNAMO_NATS_RUNTIME),),
}
"""The workload and the two sides of each row; of several the worst counts."""

_SHOWN: Final = {
    "unary c=1": (TCP, HTTP, NATS, REDIS, HYPERCORN, NATS_PY),
    "unary c=256": (TCP, HTTP, NATS, REDIS, HYPERCORN, NATS_PY),
    "burst": (TCP, HTTP, NATS, REDIS, HYPERCORN, NATS_PY),
    "echo 1 MiB": (TCP, HTTP, NATS, REDIS, HYPERCORN, NATS_PY),
}
"""Cells that no row needs, for the table."""

Rounds = dict[tuple[str, str], list[Figures]]
"""The rounds of each workload and side."""


def main() -> None:
    """Run the suite, or a part of it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planes", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rounds", type=rounds_count, default=5, help="rounds (default 5)")
    parser.add_argument("--seconds", type=length_s, default=1.2, help="length of a measurement (default 1.2)")
    parser.add_argument("--rows", help=f"ids, with commas: {', '.join(BOUNDS)}")
    arguments = parser.parse_args()
    rows = [name.strip().upper() for name in arguments.rows.split(",")] if arguments.rows else list(BOUNDS)
    if unknown := set(rows) - BOUNDS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BOUNDS)}")
    logging.getLogger("dynamo_redis").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child processes end, too
    wanted: dict[str, list[str]] = {}
    for name in rows:
        for workload, *sides in _COMPARED[name]:
            wanted.setdefault(workload, []).extend(side for side in sides)
    if not arguments.rows:
        for workload, shown in _SHOWN.items():
            wanted.setdefault(workload, []).extend(shown)
    wanted = {workload: list(dict.fromkeys(wanted[workload])) for workload in WORKLOADS if workload in wanted}
    taken = _measure(wanted, arguments.rounds, arguments.seconds)
    _show(taken)
    found = {name: measured for name in rows if (measured := _compare(name, taken)) is not None}
    report(
        "planes",
        [
            Row(
                name,
                text,
                found[name].ours,
                found[name].rival,
                found[name].ratio,
                must,
                aim,
                found[name].rounds,
            )
            for name, (text, must, aim) in BOUNDS.items()
            if name in found
        ],
        [f"{arguments.rounds} rounds of {arguments.seconds:g} s, in turn; one server a side; on loopback"],
    )
    if missing := set(rows) - found.keys():
        parser.exit(1, f"could not be measured: {', '.join(sorted(missing))}\n")


def _measure(wanted: dict[str, list[str]], rounds: int, seconds: float) -> Rounds:
    taken: Rounds = {}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in SIDES:
            if any(name in names for names in wanted.values()):
                try:
                    sides[name] = stack.enter_context(SIDES[name]())
                except Exception:
                    print(f"{name} does not start:", flush=True)
                    traceback.print_exc()
        for workload, names in wanted.items():
            names = [name for name in names if name in sides]
            for number in range(rounds):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    if name not in sides:
                        continue
                    try:
                        figures = sides[name].measure(workload, seconds)
                    except Exception:
                        print(f"{name} broke:", flush=True)
                        traceback.print_exc()
                        del sides[name]
                        continue
                    taken.setdefault((workload, name), []).append(figures)
                shown = " · ".join(
                    f"{name} {taken[workload, name][-1].per_s:,.0f}" for name in names if name in sides
                )
                print(f"{workload}, round {number + 1}, {WORKLOADS[workload].unit}/s: {shown}", flush=True)
    return taken


def _compare(name: str, taken: Rounds) -> Measured | None:
    compared: list[Measured] = []
    for workload, ours, rival in _COMPARED[name]:
        both = taken.get((workload, ours), []), taken.get((workload, rival), [])
        if not all(both) or len(both[0]) != len(both[1]):
            return None
        compared.append(Measured.against(*([one.per_s for one in rounds] for rounds in both)))
    return min(compared, key=lambda measured: measured.ratio or 0)


def _show(taken: Rounds) -> None:
    """Print the medians of all cells."""
    table = Table(title="medians of the rounds; latencies are of whole answers")
    for column in ("workload", "side", "", "a second", "p50 ms", "p99 ms", "CPU s/100k"):
        table.add_column(column, justify="left" if column in ("workload", "side", "") else "right")
    before = ""
    for (workload, side), rounds in taken.items():
        if workload != before and before:
            table.add_section()
        per_s, p50, p99, cpu = (
            median(getattr(one, name) for one in rounds)
            for name in ("per_s", "p50_ms", "p99_ms", "cpu_s_per_100k")
        )
        table.add_row(
            workload if workload != before else "", side, WORKLOADS[workload].unit,
            f"{per_s:,.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{cpu:.2f}",
        )  # fmt: skip
        before = workload
    Console(width=max(110, Console().width)).print(table)


if __name__ == "__main__":
    main()
