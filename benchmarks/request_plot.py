"""Draws the matrix of suite `request` as `results/request.svg`: `python -m benchmarks.request_plot`.

A column a workload; from above: how much a second, how long an answer took (a dot at the median, a line to
the 99th percentile), and what it cost. All axes are logarithmic. Run within the environment that has
matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from benchmarks.request_matrix import Cell, load
from benchmarks.request_workloads import WORKLOADS

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

PATH: Final = Path(__file__).parent / "results" / "request.svg"
INK: Final = "#7d8590"
"""Readable on white and on black."""
OURS_COLOUR: Final = "#e8590c"
RIVAL_COLOUR: Final = "#3b8fd6"
METRICS: Final[tuple[tuple[str, str], ...]] = (
    ("per_s", "a second\n(right is better)"),
    ("p50_ms", "an answer, ms\nmedian to p99\n(left is better)"),
    ("cpu_s_per_100k", "CPU s for 100,000\n(left is better)"),
)


def draw(cells: list[Cell]) -> None:
    """Write the picture."""
    sides = list(dict.fromkeys(one.side for one in cells))[::-1]
    names = [name for name in WORKLOADS if any(one.workload == name for one in cells)]
    figure, panels = plt.subplots(
        len(METRICS),
        len(names),
        figsize=(2.1 * len(names) + 1.5, 0.24 * len(METRICS) * len(sides) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for column, name in enumerate(names):
        for row, (metric, _) in enumerate(METRICS):
            _panel(panels[row][column], metric, [one for one in cells if one.workload == name], sides)
        panels[0][column].set_title(f"{name}\n{WORKLOADS[name].unit}", fontsize=9, color=INK)
    for row, (_, title) in enumerate(METRICS):
        panels[row][0].set_ylabel(title, fontsize=9, color=INK)
        panels[row][0].set_yticks(range(len(sides)), sides)
    figure.savefig(PATH, transparent=True, metadata={"Date": None})


def _panel(axes: Any, metric: str, cells: list[Cell], sides: list[str]) -> None:
    for one in cells:
        level, value = sides.index(one.side), getattr(one, metric)
        colour = OURS_COLOUR if one.side.startswith("ours") else RIVAL_COLOUR
        if metric == "p50_ms":
            axes.plot([value, one.p99_ms], [level, level], color=colour, linewidth=1.5)
        axes.plot([value], [level], "o", color=colour, markersize=4)
        axes.annotate(
            _short(value),
            (value, level),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            color=INK,
        )
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.12)
    axes.grid(axis="y", color=INK, alpha=0.2, linewidth=0.5)
    axes.tick_params(colors=INK, labelsize=7, length=2)
    axes.xaxis.set_minor_locator(NullLocator())
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)


def _short(value: float) -> str:
    """Two or three digits, as people say it."""
    for bound, unit in ((1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.3g}{unit}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "request", "svg.fonttype": "none", "font.family": "sans-serif"})
    draw(load())
