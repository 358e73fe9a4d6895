"""Output of commands: tables for people, JSON for programs, a progress bar for large transfers.

Results go to stdout, everything else to stderr. rich is imported only to draw a table or a bar.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from dynamo_redis.cli.formats import printable
from dynamo_redis.names import with_hex_ids
from dynamo_redis.store.base import Progress as Report

PROGRESS_FROM_BYTES = 4 << 20
"""Transfers of at least this size get a bar, on a terminal."""

_WIDTH_OF_A_PIPE = 10_000  # a program that reads the table gets all of it

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON for programs: a list; for watch, an object a line.",
)


def print_line(text: str) -> None:
    """Print one line on stdout, and flush."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_json(rows: Sequence[Any]) -> None:
    """Print a JSON list. Ids are added in hexadecimal."""
    print_line(json.dumps(with_hex_ids(list(rows)), indent=2, ensure_ascii=False))


def print_json_line(row: Any) -> None:
    """Print one JSON value on one line. Ids are added in hexadecimal."""
    print_line(json.dumps(with_hex_ids(row), ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str, wrap: str = "") -> None:
    """Print a table, or `empty` on stderr if there are no rows.

    On a terminal that is too narrow, the column `wrap` is cut short; without `wrap`, all columns are folded.
    """
    if not rows:
        sys.stderr.write(empty + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        if column == wrap:
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        else:
            table.add_column(column, overflow="fold", no_wrap=bool(wrap))
    for row in rows:
        table.add_row(*map(printable, row))
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    Console(markup=False, highlight=False, emoji=False, width=width).print(table)


def print_reasons(reasons: Iterable[str]) -> None:
    """Print below a table why some of its rows cannot be read: a cell has no room for the reason."""
    for reason in reasons:
        print_line(printable(f"unreadable: {reason}"))


@contextmanager
def progress_bar(description: str, size_bytes: int | None) -> Iterator[Report | None]:
    """Show a bar on stderr while the block runs.

    Yields the function to report to; None if no bar is shown.
    """
    if not sys.stderr.isatty() or (size_bytes is not None and size_bytes < PROGRESS_FROM_BYTES):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        SpeedColumn(),
    )
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(printable(description), total=size_bytes)
        yield lambda done, total: bar.update(task, completed=done, total=total)
