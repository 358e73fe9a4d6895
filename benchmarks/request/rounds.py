"""The turns of the sides of suite `request`."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final

from benchmarks.harness.report import median
from benchmarks.request.matrix import STAGES, Cell
from benchmarks.request.sides import SIDES, Figures, Side, idle_share
from benchmarks.request.workloads import WORKLOADS

Rounds = dict[str, list[Figures]]
"""The rounds of one workload, by side. All sides have as many, and those of one index follow each other in
time."""

_IDLE_S: Final = 2.0


def measure(wanted: set[tuple[str, str]], rounds: int, seconds: float) -> Iterator[tuple[str, Rounds]]:
    """Yield the rounds of each workload as soon as they are done. `wanted` are pairs of workload and side.

    A side that does not start or that breaks is left out, with a message.
    """
    for stage in STAGES:
        with ExitStack() as stack:
            sides = _start_sides(stack, [side for side in stage if any(side == one for _, one in wanted)])
            if sides:
                share = idle_share(list(sides.values()), _IDLE_S)
                print(f"without load, all sides together use {100 * share:.1f} % of a core", flush=True)
            for workload in WORKLOADS:
                names = [name for name in sides if (workload, name) in wanted]
                if names:
                    yield workload, _take_turns(sides, names, workload, rounds, seconds)


def _start_sides(stack: ExitStack, names: Sequence[str]) -> dict[str, Side]:
    sides = {}
    for name in names:
        try:
            sides[name] = stack.enter_context(SIDES[name]())
        except Exception:
            print(f"{name} does not start:", flush=True)
            traceback.print_exc()
    return sides


def _take_turns(
    sides: dict[str, Side], names: list[str], workload: str, rounds: int, seconds: float
) -> Rounds:
    """Run the rounds, each of which begins with another side, so that no side always follows the same one.
    Sides that break are removed."""
    taken: Rounds = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name not in taken:
                continue
            try:
                taken[name].append(sides[name].measure(workload, seconds))
            except Exception:
                print(f"{name} broke:", flush=True)
                traceback.print_exc()
                del taken[name], sides[name]
        shown = " · ".join(f"{name} {figures[-1].per_s:,.0f}" for name, figures in taken.items())
        print(f"{workload}, round {number + 1}, {WORKLOADS[workload].unit}/s: {shown}", flush=True)
    return taken


def cell(workload: str, side: str, rounds: Sequence[Figures]) -> Cell:
    """Return the medians of a side's rounds."""
    names = ("per_s", "p50_ms", "p99_ms", "cpu_s_per_100k")
    figures = {name: median(getattr(one, name) for one in rounds) for name in names}
    return Cell(workload, side, WORKLOADS[workload].unit, rounds=len(rounds), **figures)
