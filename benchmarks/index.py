"""Suite `index`: the router's prefix index and choice, against Dynamo's and against themselves.

Rows are measured by group; see README.md for how. `--rows X1,X2` runs some; those that do not run keep their
figures.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version as distribution_version

import psutil

from benchmarks.index_choice import choices
from benchmarks.index_restart import restart
from benchmarks.index_rivalry import rivalry
from benchmarks.index_size import million
from benchmarks.options import rounds_count
from benchmarks.processes import DYNAMO
from benchmarks.replay_share import share
from benchmarks.report import Measured, Row, report, save

BOUNDS: dict[str, tuple[str, float, float]] = {
    "X1": (
        "decode → gap check → index, blocks/s ÷ Dynamo 1.6.1 `RadixTree` binding fed its own wire",
        4,
        8,
    ),
    "X2": ("find 64 blocks, 64 workers, Dynamo binding ÷ ours", 3, 5),
    "X3": ("find 2,048 blocks, 64 workers, Dynamo binding ÷ ours", 3, 8),
    "X4": (
        ("choose a worker (hash a 4,096-token prompt, find, cost over 64 workers, book) ÷ hashing alone"),
        4,
        2.5,
    ),
    "X5": ("the same over 256 workers ÷ over 64", 4, 2.5),
    "X6": ("bytes a block, 1M blocks, 64 workers", 130, 100),
    "X7": ("snapshot of them, MB", 10, 8.5),
    "X8": ("restore ÷ building the same index from events", 0.6, 0.3),
    "X9": ("router restart → serving with the full index, 1M blocks, writers running, s", 3, 1.5),
    "X10": ("kv hit rate on the trace ÷ one omniscient router's", 0.97, 0.99),
}
"""Each row's words, what it must reach, and what it aims at."""

Measurement = Callable[[int], dict[str, Measured]]
"""Measures some rows, in so many rounds."""


GROUPS: tuple[tuple[tuple[str, ...], Measurement], ...] = (
    (("X1", "X2", "X3"), rivalry),
    (("X4", "X5"), choices),
    (("X6", "X7", "X8"), million),
    (("X9",), restart),
    (("X10",), share),
)
"""Rows that one measurement yields."""


def main() -> None:
    """Run the suite, or the rows asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=rounds_count, default=5, help="rounds of each measurement (default 5)"
    )
    parser.add_argument("--rows", default=",".join(BOUNDS), help="ids, with commas (default: all)")
    arguments = parser.parse_args()
    wanted = set(arguments.rows.upper().split(","))
    if unknown := wanted - BOUNDS.keys():
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    logging.getLogger("dynamo_redis").setLevel(logging.ERROR)
    conditions = _conditions(arguments.rounds)
    print("\n".join(conditions), flush=True)
    rows, failed = _measure(wanted, arguments.rounds)
    report("index", rows, conditions)
    if failed:
        parser.exit(1, f"could not be measured: {', '.join(failed)}\n")


def _measure(wanted: set[str], rounds: int) -> tuple[list[Row], list[str]]:
    """The rows wanted, and those that failed. What was measured is kept if the suite ends early."""
    rows: list[Row] = []
    failed: list[str] = []
    for ids, measure in GROUPS:
        if wanted.isdisjoint(ids):
            continue
        began = time.monotonic()
        try:
            measured = measure(rounds)
        except Exception:
            traceback.print_exc()
            failed += ids
            continue
        print(f"{' '.join(ids)} took {time.monotonic() - began:.0f} s", flush=True)
        rows += [_row(name, measured[name]) for name in ids if name in wanted]
        save("index", rows)
    return rows, failed


def _row(name: str, measured: Measured) -> Row:
    text, must, aim = BOUNDS[name]
    return Row(name, text, measured.ours, measured.rival, measured.ratio, must, aim, measured.rounds)


def _conditions(rounds: int) -> list[str]:
    """What a reader has to know to judge the figures."""
    libraries = (f"{name} {distribution_version(name)}" for name in ("msgpack", "xxhash"))
    memory_gib = psutil.virtual_memory().total / 2**30
    return [
        f"rival of X1 to X3: {DYNAMO}, by its Python binding, in a process of its own",
        f"ours: {', '.join(libraries)}; {rounds} rounds, in turn",
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB; load average at the start: {os.getloadavg()[0]:.2f}",
    ]


if __name__ == "__main__":
    main()
