"""Suite `request`: the tcp request plane against what else carries requests between Python processes.

All sides stand ready and take turns, workload by workload and round by round; see README.md for how each
row is measured. `--rows P1,P8` measures what these rows need, `--workloads "tick,unary c=64"` and
`--sides ours,nats-py` a part of the matrix and the rows that it holds. What is not measured keeps its
figures.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.harness.options import length_s, rounds_count
from benchmarks.harness.processes import REPOSITORY, rival_python
from benchmarks.harness.report import Measured, Row, report, save
from benchmarks.request import matrix as request_matrix
from benchmarks.request.connections import idle_connections, stopped_readers
from benchmarks.request.matrix import (
    DYNAMO_PLANE,
    DYNAMO_RUNTIME,
    GRPC,
    NATS,
    OURS,
    OURS_RUNTIME,
    RAW,
    STAGES,
    Cell,
)
from benchmarks.request.rounds import Rounds, cell, measure
from benchmarks.request.sides import SIDES, versions
from benchmarks.request.workloads import WORKLOADS

BOUNDS: dict[str, tuple[str, float, float]] = {
    "P1": ("plane, unary c=64 ÷ nats-py", 5, 8),
    "P2": ("plane, unary c=64 ÷ grpc.aio", 10, 20),
    "P3": ("plane, unary c=64 ÷ Dynamo 1.6.1 tcp", 15, 30),
    "P4": ("plane, unary c=256 ÷ nats-py", 5, 8),
    "P5": ("plane, unary c=1 ÷ raw uvloop echo", 0.45, 0.65),
    "P6": ("CPU seconds a request at c=64, nats-py (with its server) ÷ ours", 4, 6),
    "P7": ("p99 at c=64, nats-py ÷ ours", 2, 4),
    "P8": ("tick ÷ nats-py", 6, 10),
    "P9": ("burst ÷ nats-py", 25, 50),
    "P10": ("1 MiB echo ÷ nats-py", 4, 6),
    "P11": ("8 MiB echo ÷ nats-py", 3, 5),
    "P12": ("runtime API (`Client.round_robin`, 4 instances), unary c=64 ÷ Dynamo 1.6.1", 10, 25),
    "P13": ("runtime API, 200-item streams c=32 ÷ Dynamo 1.6.1", 8, 16),
    "P14": (
        (
            "memory an idle connection of 1,000, KiB (one scratch and one Unpacker a loop; a connection owns "
            "one only while it holds a partial frame: an Unpacker costs 42 KiB)"
        ),
        24,
        10,
    ),
    "P15": (
        "10 stopped readers beside 54 fast ones: the fast ones' throughput ÷ without the stopped",
        0.9,
        0.97,
    ),
}
"""Text, bound (`must`) and aim of each row."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two cells of the matrix, and the figure of them that is compared."""

    workload: str
    rival: str
    ours: str = OURS
    figure: str = "per_s"

    @property
    def cells(self) -> set[tuple[str, str]]:
        """The cells that it needs, by workload and side."""
        return {(self.workload, self.ours), (self.workload, self.rival)}

    def measured(self, rounds: Rounds) -> Measured:
        """Return the row, computed from the rounds of each side on the workload."""
        ours, rival = (
            [getattr(one, self.figure) for one in rounds[side]] for side in (self.ours, self.rival)
        )
        return Measured.against(ours, rival, costs=self.figure != "per_s")


COMPARISONS: dict[str, Comparison] = {
    "P1": Comparison("unary c=64", NATS),
    "P2": Comparison("unary c=64", GRPC),
    "P3": Comparison("unary c=64", DYNAMO_PLANE),
    "P4": Comparison("unary c=256", NATS),
    "P5": Comparison("unary c=1", RAW),
    "P6": Comparison("unary c=64", NATS, figure="cpu_s_per_100k"),
    "P7": Comparison("unary c=64", NATS, figure="p99_ms"),
    "P8": Comparison("tick", NATS),
    "P9": Comparison("burst", NATS),
    "P10": Comparison("echo 1 MiB", NATS),
    "P11": Comparison("echo 8 MiB", NATS),
    "P12": Comparison("unary c=64", DYNAMO_RUNTIME, OURS_RUNTIME),
    "P13": Comparison("tick", DYNAMO_RUNTIME, OURS_RUNTIME),
}


ALONE: dict[str, Callable[[int, float], Measured]] = {
    "P14": lambda rounds, _: idle_connections(rounds),
    "P15": stopped_readers,
}
"""Rows that compare the plane with itself: functions of the rounds and the seconds of a measurement."""


def main() -> None:
    """Run the suite, or a part of it."""
    parser = _parser()
    arguments = parser.parse_args()
    wanted, rows = selection(
        _chosen(parser, arguments.rows and arguments.rows.upper().split(","), BOUNDS),
        _chosen(parser, arguments.workloads and arguments.workloads.split(","), WORKLOADS),
        _chosen(parser, arguments.sides and arguments.sides.split(","), SIDES),
    )
    if not wanted and not rows:
        parser.error("there is nothing to measure: no row needs that workload and side")
    logging.getLogger("dynamo_redis").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child processes end, too
    _allow_many_files()
    began = time.monotonic()
    conditions = _conditions(wanted, arguments)
    print("\n".join(conditions), flush=True)

    measured, cells = _matrix(wanted, rows, arguments)
    for name in (name for name in ALONE if name in rows):
        try:
            measured[name] = ALONE[name](arguments.rounds, arguments.seconds)
        except Exception:
            traceback.print_exc()
    if cells:
        _show(cells)
    report("request", [_row(name, measured[name]) for name in BOUNDS if name in measured], conditions)
    _draw()
    print(f"took {(time.monotonic() - began) / 60:.1f} min; load average: {os.getloadavg()[0]:.2f}")
    if failed := [name for name in BOUNDS if name in rows - measured.keys()]:
        parser.exit(1, f"could not be measured: {', '.join(failed)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sides, workloads = (", ".join(names) for names in (SIDES, WORKLOADS))
    parser.add_argument(
        "--rounds", type=rounds_count, default=5, help="rounds of each measurement (default 5)"
    )
    parser.add_argument("--seconds", type=length_s, default=1.2, help="length of a measurement (default 1.2)")
    parser.add_argument("--rows", help=f"ids, with commas: {', '.join(BOUNDS)}")
    parser.add_argument("--workloads", help=f"names, with commas: {workloads}")
    parser.add_argument("--sides", help=f"names, with commas: {sides}")
    return parser


def _chosen(
    parser: argparse.ArgumentParser, names: list[str] | None, known: Iterable[str]
) -> set[str] | None:
    """Return the chosen names; None for all."""
    if names is None:
        return None
    chosen = {name.strip() for name in names}
    if unknown := chosen - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return chosen


def selection(
    rows: set[str] | None, workloads: set[str] | None, sides: set[str] | None
) -> tuple[set[tuple[str, str]], set[str]]:
    """Return the cells to measure, as pairs of workload and side, and the rows that they make up.

    `rows` alone take the cells that they need; `workloads` and `sides` narrow that (None: all). A row that
    lacks a cell is left out. So are rows outside the matrix where it has been narrowed.
    """
    if rows is None:
        cells = {(workload, side) for stage in STAGES for side, names in stage.items() for workload in names}
    else:
        cells = {pair for name in rows & COMPARISONS.keys() for pair in COMPARISONS[name].cells}
    cells = {
        (workload, side)
        for workload, side in cells
        if (workloads is None or workload in workloads) and (sides is None or side in sides)
    }
    held = {name for name, comparison in COMPARISONS.items() if comparison.cells <= cells}
    if workloads is None and sides is None:
        held |= ALONE.keys()
    return cells, held if rows is None else held & rows


def _matrix(
    wanted: set[tuple[str, str]], rows: set[str], arguments: argparse.Namespace
) -> tuple[dict[str, Measured], list[Cell]]:
    """Measure the matrix, and return its rows and cells. Each workload is saved as soon as it is done."""
    measured: dict[str, Measured] = {}
    cells: list[Cell] = []
    for workload, rounds in measure(wanted, arguments.rounds, arguments.seconds):
        new = [cell(workload, side, figures) for side, figures in rounds.items()]
        request_matrix.save(new)
        cells += new
        for name in COMPARISONS.keys() & rows:
            comparison = COMPARISONS[name]
            if comparison.workload == workload and {comparison.ours, comparison.rival} <= rounds.keys():
                measured[name] = comparison.measured(rounds)
                save("request", [_row(name, measured[name])])
    return measured, cells


def _row(name: str, measured: Measured) -> Row:
    text, must, aim = BOUNDS[name]
    return Row(name, text, measured.ours, measured.rival, measured.ratio, must, aim, measured.rounds)


def _show(cells: Sequence[Cell]) -> None:
    """Print the measured cells of the matrix. The ratios are of the medians, not those of the rows."""
    ours = {(one.workload, one.side): one.per_s for one in cells if one.side in (OURS, OURS_RUNTIME)}
    table = Table(title="medians of the rounds; latencies are of whole answers")
    for column in ("workload", "side", "", "a second", "ours ÷ it", "p50 ms", "p99 ms", "CPU s/100k"):
        table.add_column(column, justify="left" if column in ("workload", "side", "") else "right")
    before = ""
    for one in cells:
        if one.workload != before and before:
            table.add_section()
        first = one.workload if one.workload != before else ""
        mine = ours.get((one.workload, OURS_RUNTIME if one.side in STAGES[1] else OURS))
        figures = (f"{one.p50_ms:.2f}", f"{one.p99_ms:.2f}", f"{one.cpu_s_per_100k:.2f}")
        ratio = f"{mine / one.per_s:.2f}" if mine else ""
        table.add_row(first, one.side, one.unit, f"{one.per_s:,.0f}", ratio, *figures)
        before = one.workload
    Console(width=max(110, Console().width)).print(table)


def _draw() -> None:
    """Draw the saved cells of the matrix, by a library that no other part here needs."""
    if not request_matrix.load():
        return
    try:
        command = [rival_python("plot", "matplotlib"), "-m", "benchmarks.request.plot"]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    except (subprocess.CalledProcessError, OSError) as exc:
        print(f"not drawn: {exc}", flush=True)


def _allow_many_files() -> None:
    """Raise the limit of open files, which a thousand connections exceed. Child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _conditions(wanted: set[tuple[str, str]], arguments: argparse.Namespace) -> list[str]:
    """Return the conditions of the measurement that a reader needs to judge the figures."""
    memory_gib = psutil.virtual_memory().total / 2**30
    libraries = f"msgpack {version('msgpack')}, uvloop {version('uvloop')}"
    return [
        f"rivals: {'; '.join(versions({side for _, side in wanted})) or 'none'}",
        f"ours: defaults and a secret, {libraries}; all over loopback",
        f"{arguments.rounds} rounds of {arguments.seconds:g} s, in turn",
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB; load average at the start: {os.getloadavg()[0]:.2f}",
    ]


if __name__ == "__main__":
    main()
