"""Draws the matrix of suite `request` as `results/request.svg`: `python -m benchmarks.request_plot`.

A column a workload; from above: how much a second, how long an answer took (a dot at the median, a line to
the 99th percentile), and what it cost. All axes are logarithmic. Run within the environment that has
matplotlib.
"""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from benchmarks.request_matrix import STAGES, Cell, load
from benchmarks.request_workloads import WORKLOADS

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
    measured = {one.side for one in cells}
    sides = [side for stage in STAGES for side in stage if side in measured][::-1]
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
        panels[0][column].set_title(f"{name}\n({WORKLOADS[name].unit})", fontsize=9, color=INK)
    for row, (_, title) in enumerate(METRICS):
        panels[row][0].set_ylabel(title, fontsize=9, color=INK)
        panels[row][0].set_yticks(range(len(sides)), sides)
    figure.savefig(PATH, transparent=True, metadata={"Date": None})


def _panel(axes: Any, metric: str, cells: list[Cell], sides: list[str]) -> None:
    levels = [level for number in range(len(sides)) for level in (number, number, nan)]
    grid = axes.get_yaxis_transform()
    axes.plot([0, 1, nan] * len(sides), levels, color=INK, alpha=0.2, linewidth=0.5, transform=grid)
    for ours, colour in ((True, OURS_COLOUR), (False, RIVAL_COLOUR)):
        group = [one for one in cells if one.side.startswith("ours") is ours]
        if metric == "p50_ms":
            spans = [end for one in group for end in (one.p50_ms, one.p99_ms, nan)]
            heights = [level for one in group for level in (*[sides.index(one.side)] * 2, nan)]
            axes.plot(spans, heights, color=colour, linewidth=1.5)
        dots = [getattr(one, metric) for one in group]
        axes.plot(dots, [sides.index(one.side) for one in group], "o", color=colour, markersize=4)
    for one in cells:
        value = getattr(one, metric)
        place = (value, sides.index(one.side))
        text = {"textcoords": "offset points", "ha": "center", "fontsize": 6, "color": INK}
        axes.annotate(_short(value), place, (0, 3), **text)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.12)
    axes.tick_params(colors=INK, labelsize=7, bottom=False, left=False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
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
    plt.rcParams.update(
        {"svg.hashsalt": "request", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    )
    draw(load())
