"""Brings the figures on the pages up to date with the results of the suites.

A figure has one of two forms, which are looked for on every page:

- A line of a table whose first cell is a row's id is the line that `report.markdown` makes.
- A figure in a sentence has a mark behind it that names its row and column, `80,000<!-- S2 ours -->`; of a
  row with several figures also the place, from 0: `6.1<!-- R7 ours 1 -->`. It keeps the number of digits that
  it has on the page, and has two at least.

`python -m benchmarks.pages` brings all pages up to date. A test demands that this changes nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.harness.processes import REPOSITORY
from benchmarks.harness.report import RESULTS, as_list, markdown

SUITES: Final = ("start", "registry", "request", "planes", "events", "index", "frontend", "ha", "scale")

MARK: Final = re.compile(r"(none|\d[\d,]*(?:\.\d+)?)<!-- ([A-Z]\d+) (ours|rival|ratio)(?: (\d+))? -->")
_ROW: Final = re.compile(r"^\| ([A-Z]\d+) \|.*$", re.MULTILINE)

Results = Mapping[str, Mapping[str, Any]]
"""Rows by their ids."""


def pages() -> list[Path]:
    """Return the pages that show figures."""
    return sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), RESULTS.parent / "README.md"])


def results() -> Results:
    """Return the figures that the suites have measured."""
    return {
        entry["id"]: entry
        for suite in SUITES
        for entry in json.loads((RESULTS / f"{suite}.json").read_text())
    }


def lines() -> dict[str, str]:
    """Return the line of a table for each row."""
    return {found[1]: found[0] for suite in SUITES for found in _ROW.finditer(markdown(suite))}


def updated(page: str, found: Results, rows: Mapping[str, str]) -> str:
    """Return the page with the figures of the results. Raises KeyError for an unknown row, and ValueError for
    a figure that the row does not have."""

    def figure(match: re.Match[str]) -> str:
        shown, row, column, place = match.groups()
        value = found[row][column]
        if value is None:
            raise ValueError(f"{row} has no {column}")
        return match[0].replace(shown, written(as_list(value)[int(place or 0)], digits(shown)), 1)

    page = MARK.sub(figure, page)
    return _ROW.sub(lambda match: rows[match[1]], page)


def digits(shown: str) -> int:
    """Return the number of significant digits of a figure. Zeros at the end of a whole number do not
    count."""
    if shown == "none":
        return 2
    bare = shown.replace(",", "")
    if "." not in bare:
        bare = bare.rstrip("0")
    return max(2, len(bare.replace(".", "").lstrip("0")))


def written(value: float, digits_count: int) -> str:
    """Return a figure with `digits_count` significant digits."""
    if value == 0:
        return "none"
    places = digits_count - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def main() -> None:
    """Bring the pages up to date."""
    found, rows = results(), lines()
    for path in pages():
        before = path.read_text()
        if (after := updated(before, found, rows)) != before:
            path.write_text(after)
            print(f"updated {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
