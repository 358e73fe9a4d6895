"""What every suite writes: a table for people, and `results/SUITE.json` for programs."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a suite's table: medians over `rounds`, and the bounds they are held against.

    `ratio` is None where nothing is compared; then `ours` counts. An aim below the must says that lower is
    better.
    """

    id: str
    row: str
    ours: float
    rival: float | None
    ratio: float | None
    must: float
    aim: float
    rounds: int

    @property
    def figure(self) -> float:
        """What is held against the bounds."""
        return self.ours if self.ratio is None else self.ratio

    @property
    def verdict(self) -> str:
        """Where the figure stands: better is below the bounds where the aim lies below the must."""
        lower = self.aim < self.must
        reached = [self.figure <= bound if lower else self.figure >= bound for bound in (self.must, self.aim)]
        return "aim" if all(reached) else "must" if reached[0] else "missed"


def median(values: Iterable[float]) -> float:
    """The median, rounded to four significant digits."""
    return float(f"{statistics.median(values):.4g}")


def machine() -> str:
    """Where this ran, in one line."""
    return (
        f"{platform.machine()}, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def report(suite: str, rows: Sequence[Row], conditions: Sequence[str]) -> None:
    """Print the table and write the results."""
    console = Console(width=max(150, Console().width))
    table = Table(title=f"suite {suite}", caption="\n".join([*conditions, machine()]), caption_justify="left")
    for column in ("id", "what", "ours", "rival", "ratio", "must", "aim", "reached", "rounds"):
        table.add_column(column)
    for row in rows:
        bound = "≤" if row.aim < row.must else "≥"
        table.add_row(
            row.id,
            row.row,
            f"{row.ours:g}",
            "–" if row.rival is None else f"{row.rival:g}",
            "–" if row.ratio is None else f"{row.ratio:g}",
            f"{bound} {row.must:g}",
            f"{bound} {row.aim:g}",
            row.verdict,
            str(row.rounds),
        )
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False)
    (RESULTS / f"{suite}.json").write_text(content + "\n")
