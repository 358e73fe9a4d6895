"""Common parts of suites of rows: the command line, and measuring group by group.

A group is the rows of one measurement. If a measurement fails, only its own rows are lost; figures are saved
as soon as they are measured.
"""

from __future__ import annotations

import argparse
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from benchmarks.harness.options import rounds_count
from benchmarks.harness.report import Figure, Measured, Row, report, save

Bounds = Mapping[str, tuple[str, Figure, Figure]]
"""By row id: text, bound (`must`) and aim."""

Measurement = Callable[[int], dict[str, Measured]]
"""A function that measures some rows in the given number of rounds."""

Groups = Sequence[tuple[tuple[str, ...], Measurement]]
"""The rows of each measurement."""

Conditions = Callable[[set[str], int], list[str]]
"""A function from the wanted rows and the rounds to the conditions that a reader needs to judge the
figures."""


def run_suite(
    name: str,
    description: str | None,
    bounds: Bounds,
    groups: Groups,
    conditions: Conditions,
    *,
    unavailable: tuple[type[Exception], ...] = (),
    default_rounds: int = 5,
) -> None:
    """Run the suite, or the rows of the command line; print and save the figures.

    Args:
        name: Name of the suite, of its package and of its results.
        description: Text of `--help`.
        bounds: Text, `must` and aim of each row.
        groups: The measurements, each with its rows.
        conditions: Describes the conditions of the measurement.
        unavailable: Errors of `conditions` that name in one line a part that is not installed.
        default_rounds: Rounds of each measurement, unless the command line has others.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds",
        type=rounds_count,
        default=default_rounds,
        help=f"rounds of each measurement (default {default_rounds})",
    )
    parser.add_argument("--rows", default=",".join(bounds), help="ids, with commas (default: all)")
    arguments = parser.parse_args()
    wanted = set(arguments.rows.upper().split(","))
    if unknown := wanted - bounds.keys():
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    # Warnings about killed workers and servers are expected: killing them is the measurement.
    logging.getLogger("dynamo_redis").setLevel(logging.ERROR)
    try:
        described = conditions(wanted, arguments.rounds)
    except unavailable as exc:
        parser.exit(1, f"{exc}\n")
    print("\n".join(described), flush=True)
    rows, failed = _measure(name, bounds, groups, wanted, arguments.rounds)
    report(name, rows, described)
    if failed:
        parser.exit(1, f"could not be measured: {', '.join(failed)}\n")


def _measure(
    name: str, bounds: Bounds, groups: Groups, wanted: set[str], rounds: int
) -> tuple[list[Row], list[str]]:
    """Measure the wanted rows. Returns them, and the ids of those that failed."""
    rows: list[Row] = []
    failed: list[str] = []
    for ids, measure in groups:
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
        for row in ids:
            if row in wanted:
                text, must, aim = bounds[row]
                found = measured[row]
                rows.append(Row(row, text, found.ours, found.rival, found.ratio, must, aim, found.rounds))
        save(name, rows)
    return rows, failed
