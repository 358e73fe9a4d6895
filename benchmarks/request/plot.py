"""Draws the matrix of suite `request` as `results/request.svg`: `python -m benchmarks.request.plot`.

There is a row for each workload. From the left: units a second, the time of an answer (a dot at the median, a
line to the 99th percentile), and the CPU cost. All axes are logarithmic. Run it within the environment that
has matplotlib.
"""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from benchmarks.request.matrix import STAGES, Cell, load
from benchmarks.request.workloads import WORKLOADS

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

PATH: Final = Path(__file__).parents[1] / "results" / "request.svg"
INK: Final = "#7d8590"
"""Readable on white and on black."""
OURS_COLOUR: Final = "#e8590c"
RIVAL_COLOUR: Final = "#3b8fd6"
METRICS: Final[tuple[tuple[str, str], ...]] = (
    ("per_s", "a second (right is better)"),
    ("p50_ms", "an answer, ms, median to p99 (left is better)"),
    ("cpu_s_per_100k", "CPU s for 100,000 (left is better)"),
)
WIDTH_INCHES: Final = 10.5
SIDE_INCHES, MARGIN_INCHES = 0.21, 0.5
"""The height in a row for each side, and for the space around it."""


def draw(cells: list[Cell]) -> None:
    """Write the picture."""
    rows = {name: [one for one in cells if one.workload == name] for name in WORKLOADS}
    rows = {name: row for name, row in rows.items() if row}
    heights = [SIDE_INCHES * len(row) + MARGIN_INCHES for row in rows.values()]
    figure, panels = plt.subplots(
        len(rows),
        len(METRICS),
        figsize=(WIDTH_INCHES, sum(heights)),
        height_ratios=heights,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (name, row), axes in zip(rows.items(), panels, strict=True):
        order = [side for stage in STAGES for side in stage][::-1]
        row.sort(key=lambda one: order.index(one.side))
        for (metric, _), panel in zip(METRICS, axes, strict=True):
            _panel(panel, metric, row)
        axes[0].set_yticks(range(len(row)), [one.side for one in row])
        axes[0].set_ylabel(f"{name}\n({WORKLOADS[name].unit})", fontsize=9, color=INK)
    for (_, title), panel in zip(METRICS, panels[0], strict=True):
        panel.set_title(title, fontsize=9, color=INK)
    figure.savefig(PATH, transparent=True, metadata={"Date": None})


def _panel(axes: Any, metric: str, cells: list[Cell]) -> None:
    """Draw one metric of one workload, a line for each side, from below."""
    levels = [level for number in range(len(cells)) for level in (number, number, nan)]
    grid = axes.get_yaxis_transform()
    axes.plot([0, 1, nan] * len(cells), levels, color=INK, alpha=0.2, linewidth=0.5, transform=grid)
    for ours, colour in ((True, OURS_COLOUR), (False, RIVAL_COLOUR)):
        group = [pair for pair in enumerate(cells) if pair[1].side.startswith("ours") is ours]
        if metric == "p50_ms":
            spans = [end for _, one in group for end in (one.p50_ms, one.p99_ms, nan)]
            ends = [end for level, _ in group for end in (level, level, nan)]
            axes.plot(spans, ends, color=colour, linewidth=1.5)
        dots = [getattr(one, metric) for _, one in group]
        axes.plot(dots, [level for level, _ in group], "o", color=colour, markersize=4)
    for level, one in enumerate(cells):
        value = getattr(one, metric)
        text = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 7, "color": INK}
        axes.annotate(_short(value), (value, level), (-4, 0), **text)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_ylim(-0.7, len(cells) - 0.3)
    axes.tick_params(colors=INK, labelsize=7, bottom=False, left=False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)


def _short(value: float) -> str:
    """Return a figure with two or three digits."""
    for bound, unit in ((1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.3g}{unit}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    plt.rcParams.update(
        {"svg.hashsalt": "request", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    )
    draw(load())
