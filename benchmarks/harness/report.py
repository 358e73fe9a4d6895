"""The output of every suite: a table for people, and `results/SUITE.json` for programs.

`python -m benchmarks.harness.report SUITE` prints the results as the Markdown table of the README.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "results"

Figure = float | list[float]
"""One number, or a list where a row has several figures."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a suite's table: medians over `rounds`, and the bounds that they must meet.

    `ratio` is None where nothing is compared; then `ours` counts. An aim below the must means that lower is
    better. If both are equal, the bound is one from above if it is 0, and else one from below. Where a row
    holds several figures, the one that counts and both bounds are lists of one length.
    """

    id: str
    row: str
    ours: Figure
    rival: Figure | None
    ratio: Figure | None
    must: Figure
    aim: Figure
    rounds: int

    @property
    def figures(self) -> list[float]:
        """The figures that must meet the bounds."""
        return as_list(self.ours if self.ratio is None else self.ratio)

    @property
    def verdict(self) -> str:
        """The row's result against its bounds: that of its worst figure."""
        if self._reach(self.aim):
            return "aim"
        return "must" if self._reach(self.must) else "missed"

    @property
    def sign(self) -> str:
        """`≤` if figures must stay below the bounds, `≥` if above."""
        aim, must = as_list(self.aim)[0], as_list(self.must)[0]
        return "≤" if aim < must or aim == must == 0 else "≥"

    def _reach(self, bounds: Figure) -> bool:
        pairs = list(zip(self.figures, as_list(bounds), strict=True))
        return all(figure <= bound if self.sign == "≤" else figure >= bound for figure, bound in pairs)


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of a measurement before it is compared with bounds: medians over `rounds`."""

    ours: Figure
    rival: Figure | None
    ratio: Figure | None
    rounds: int

    @classmethod
    def alone(cls, *ours: Sequence[float]) -> Self:
        """Return the medians of figures without a rival, each given by its rounds."""
        figures = [median(rounds) for rounds in ours]
        return cls(figures if len(figures) > 1 else figures[0], None, None, len(ours[0]))

    @classmethod
    def against(cls, ours: Sequence[float], rival: Sequence[float], *, costs: bool = False) -> Self:
        """Return the medians of two sides that took turns. The ratio is the median of the rounds' ratios.

        The ratio is ours ÷ the rival's; the rival's ÷ ours where the figures are `costs`, of which less is
        better.
        """
        pairs = zip(rival, ours, strict=True) if costs else zip(ours, rival, strict=True)
        ratio = median(one / other for one, other in pairs)
        return cls(median(ours), median(rival), ratio, len(ours))


def as_list(figure: Figure) -> list[float]:
    """Return a row's figures as a list, also if there is only one."""
    return figure if isinstance(figure, list) else [figure]


def median(values: Iterable[float]) -> float:
    """Return the median, rounded to four significant digits."""
    return float(f"{statistics.median(values):.4g}")


def machine() -> str:
    """Describe this machine in one line."""
    return (
        f"{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def report(suite: str, rows: Sequence[Row], conditions: Sequence[str]) -> None:
    """Print the table and save the results."""
    console = Console(width=max(150, Console().width))
    table = Table(title=f"suite {suite}", caption="\n".join([*conditions, machine()]), caption_justify="left")
    for column in ("id", "what", "ours", "rival", "ratio", "must", "aim", "reached", "rounds"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.id,
            row.row,
            _format_figure(row.ours),
            _format_figure(row.rival),
            _format_figure(row.ratio),
            f"{row.sign} {_format_figure(row.must)}",
            f"{row.sign} {_format_figure(row.aim)}",
            row.verdict,
            str(row.rounds),
        )
    console.print(table)
    save(suite, rows)


def _format_figure(figure: Figure | None) -> str:
    return "–" if figure is None else "; ".join(f"{number:g}" for number in as_list(figure))


def save(suite: str, rows: Sequence[Row]) -> None:
    """Write the results. Rows of the suite that did not run keep their earlier figures."""
    path = RESULTS / f"{suite}.json"
    former = json.loads(path.read_text()) if path.exists() else []
    merged = {entry["id"]: entry for entry in former} | {row.id: asdict(row) for row in rows}
    ordered = sorted(merged.values(), key=lambda entry: (len(entry["id"]), entry["id"]))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")


def markdown(suite: str) -> str:
    """Return the table of a suite's results in Markdown."""
    rows = [Row(**entry) for entry in json.loads((RESULTS / f"{suite}.json").read_text())]
    lines = ["| | | ours | rival | ratio | must | aim |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            row.id,
            row.row,
            _format_figure(row.ours),
            _format_figure(row.rival),
            _format_figure(row.ratio),
        ]
        cells += [f"{row.sign} {_format_figure(row.must)}", f"{row.sign} {_format_figure(row.aim)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(sys.argv[1]))
