"""Draws the rows of a replay beside their figures: `python -m benchmarks.replay.plot [results/replay.json]`.

There is a row for each way of routing, in a group for each kind of arrivals, and one group for the runs in
which a process was killed. From the left: the hit rate, the time to the first token (a dot at the median, a
cross at the mean, a line to the 99th percentile), the balance of the tokens that workers read, and the rate
of KV events. Chats that share long prompts are left out: the picture is of one trace. It needs nothing but
matplotlib: run it within the environment that has it.
"""

from __future__ import annotations

import json
import sys
from math import nan
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

RESULTS: Final = Path(__file__).parents[1] / "results" / "replay.json"
LEFT_OUT: Final = "shared-prompts"
INK: Final = "#7d8590"
"""Readable on white and on black."""
COLOURS: Final = {
    "omniscient": "#7d8590",
    "kv": "#e8590c",
    "predicted": "#f2a65a",
    "rr": "#3b8fd6",
    "p2c": "#86b9e6",
}
NAMES: Final = {
    "omniscient": "omniscient router (simulated)",
    "kv": "kv",
    "predicted": "kv without events",
    "rr": "round robin",
    "p2c": "p2c",
}
TITLES: Final = (
    "prompt tokens found in caches\n(right is better)",
    "seconds to the first token: • median, × mean\n(its figure stands before), to p99 (left is better)",
    "prompt tokens read, busiest\nworker ÷ mean (left is better)",
    "KV events a second,\nreal time",
)
WIDTHS: Final = (1.0, 1.0, 0.8, 0.4)
WIDTH_INCHES: Final = 12.0
ROW_INCHES, MARGIN_INCHES = 0.24, 0.3
_ROOM: Final = 1.25
"""Width of an axis by its largest value, which leaves room for the figure behind it."""

Row = dict[str, Any]


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each part of the picture, by its name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["fault"] is not None:
            name = "killed while\nit runs"
        elif row["load"] is None:
            name = "arrivals\nas given"
        else:
            name = f"arrivals Poisson,\nload {row['load']:g}"
        found.setdefault(name, []).append(row)
    return dict(sorted(found.items(), key=lambda part: part[1][0]["fault"] is not None))


def label(row: Row) -> str:
    """Return the text before a row."""
    text = NAMES[row["mode"]]
    if row["mode"] != "omniscient":
        text += f", {row['replicas']} router{'s' if row['replicas'] > 1 else ''}"
    return f"{row['fault']}: {text}" if row["fault"] else text


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture."""
    parts = groups(rows)
    heights = [ROW_INCHES * len(part) + MARGIN_INCHES for part in parts.values()]
    figure, panels = plt.subplots(
        len(parts),
        len(TITLES),
        figsize=(WIDTH_INCHES, sum(heights)),
        height_ratios=heights,
        width_ratios=WIDTHS,
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (name, part), axes in zip(parts.items(), panels, strict=True):
        part = part[::-1]
        _hit_rates(axes[0], part, max(row["hit_rate"] for row in rows))
        _times(axes[1], part)
        _balances(axes[2], part, max(row["imbalance"] for row in rows))
        _events(axes[3], part, max(row["events_per_s"] or 0 for row in rows))
        for panel in axes:
            _dress(panel, len(part))
        axes[0].set_yticks(range(len(part)), [label(row) for row in part])
        axes[0].set_ylabel(name, fontsize=9, color=INK)
    for title, panel in zip(TITLES, panels[0], strict=True):
        panel.set_title(title, fontsize=8.5, color=INK)
    figure.align_ylabels(panels[:, 0])
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _hit_rates(axes: Any, rows: list[Row], most: float) -> None:
    for level, row in enumerate(rows):
        axes.barh(level, row["hit_rate"], 0.62, color=COLOURS[row["mode"]])
        _label_value(axes, f"{row['hit_rate']:.1%}", row["hit_rate"], level, after=True)
    axes.set_xlim(0, _ROOM * most)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _times(axes: Any, rows: list[Row]) -> None:
    for level, row in enumerate(rows):
        colour = COLOURS[row["mode"]]
        axes.plot([row["ttft_p50_s"], row["ttft_p99_s"], nan], [level] * 3, color=colour, linewidth=2)
        axes.plot(row["ttft_p50_s"], level, "o", color=colour, markersize=5)
        axes.plot(row["ttft_mean_s"], level, "x", color=colour, markersize=6, markeredgewidth=2)
        _label_value(axes, f"{row['ttft_mean_s']:.2f}", row["ttft_p50_s"], level, after=False)
        _label_value(axes, f"{row['ttft_p99_s']:.0f}", row["ttft_p99_s"], level, after=True)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _balances(axes: Any, rows: list[Row], most: float) -> None:
    for level, row in enumerate(rows):
        axes.plot([1, row["imbalance"]], [level, level], color=COLOURS[row["mode"]], linewidth=2, zorder=1)
        axes.plot(row["imbalance"], level, "o", color=COLOURS[row["mode"]], markersize=5)
        _label_value(axes, f"{row['imbalance']:.2f}", row["imbalance"], level, after=True)
    axes.set_xlim(1, 1 + _ROOM * (most - 1))


def _events(axes: Any, rows: list[Row], most: float) -> None:
    for level, row in enumerate(rows):
        if row["events_per_s"] is not None:
            axes.barh(level, row["events_per_s"], 0.62, color=COLOURS[row["mode"]])
            _label_value(axes, f"{row['events_per_s']:.0f}", row["events_per_s"], level, after=True)
    axes.set_xlim(0, 1.4 * most or 1)


def _label_value(axes: Any, text: str, x: float, y: float, *, after: bool) -> None:
    axes.annotate(
        text,
        (x, y),
        (5, 0) if after else (-5, 0),
        textcoords="offset points",
        ha="left" if after else "right",
        va="center",
        fontsize=7,
        color=INK,
    )


def _dress(axes: Any, count: int) -> None:
    axes.set_ylim(-0.7, count - 0.3)
    axes.tick_params(colors=INK, labelsize=8, bottom=False, left=False)
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.5)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    plt.rcParams.update(
        {"svg.hashsalt": "replay", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    )
    traced = [row for row in json.loads(source.read_text()) if row["trace"] != LEFT_OUT]
    draw(traced, source.with_suffix(".svg"))
