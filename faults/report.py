"""The results of a session's runs: a table for people, and a file a server for `docs/guarantees.md`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from faults.session import Result


def progress(console: Console, result: Result) -> None:
    """Print a line when a run is over, and its reports if a promise was broken."""
    if result.skipped is not None:
        console.print(f"[yellow]skipped[/] {result.plan}: {result.skipped}", highlight=False)
        return
    if not result.bad:
        console.print(f"[green]passed[/]  {result.plan}{_recovered(result)}", highlight=False)
        return
    console.print(f"[red]FAILED[/]  {result.plan}{_recovered(result)}", highlight=False)
    for _, text in result.violations:
        console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)
    if result.failed is not None:
        console.print(f"  could not be carried out: {result.failed}", markup=False, soft_wrap=True)
    console.print(f"  histories and logs: {result.kept}", markup=False, soft_wrap=True)
    console.print(f"  again: {result.plan.replay}", markup=False, soft_wrap=True)


def _recovered(result: Result) -> str:
    if result.figures is None or result.figures.recovery_s is None:
        return ""
    return f" (all agreed {result.figures.recovery_s:.1f} s after the last fault)"


def table(results: Sequence[Result]) -> Table:
    """Return a row for each server and scenario."""
    made = Table("server", "scenario", title="Faults", title_justify="left")
    for name in ("seeds", "calls", "unknown", "batches", "entries", "resyncs", "recovery s", "violations"):
        made.add_column(name, justify="right")
    for (server, scenario), some in sorted(_by_scenario(results).items()):
        made.add_row(server, scenario, *_cells(summary(some)))
    return made


def _cells(row: dict[str, Any]) -> Iterable[str]:
    if not row["seeds"]:
        return ("", "", "", "", "", "", "", "skipped")
    bad = sum(row["violations"].values())
    worst = row["worst_recovery_s"]
    return (
        str(len(row["seeds"])),
        *(str(row[name]) for name in ("calls", "unknown_calls", "watch_batches", "log_entries", "resyncs")),
        "never" if worst is None else f"{worst:.1f}",
        f"[red]{bad}[/]" if bad else "0",
    )


def _by_scenario(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.plan.server, result.plan.scenario.name), []).append(result)
    return found


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Return all seeds of one scenario on one server, as JSON.

    `worst_recovery_s` is null if a run never recovered. `violations` counts by oracle; "run" are runs that
    could not be carried out.
    """
    ran = [result for result in results if result.skipped is None]
    figures = [result.figures for result in ran if result.figures is not None]
    recoveries = [figure.recovery_s for figure in figures]
    known = [recovery_s for recovery_s in recoveries if recovery_s is not None]
    violations = Counter(oracle for result in ran for oracle, _ in result.violations)
    violations.update("run" for result in ran if result.failed is not None)
    return {
        "summary": results[0].plan.scenario.summary,
        "skipped": results[0].skipped,
        "seeds": sorted(result.plan.seed for result in ran),
        "calls": sum(figure.calls for figure in figures),
        "unknown_calls": sum(figure.unknown for figure in figures),
        "watch_batches": sum(figure.watch_batches for figure in figures),
        "log_entries": sum(figure.log_entries for figure in figures),
        "resyncs": sum(figure.resyncs for figure in figures),
        "lease_losses": sum(figure.lease_losses for figure in figures),
        "worst_recovery_s": round(max(known), 2) if known and len(known) == len(recoveries) else None,
        "violations": dict(sorted(violations.items())),
    }


def write_results(results: Sequence[Result], directory: Path) -> list[Path]:
    """Write `<server>.json` for each server: scenario → its summary. Scenarios that did not run keep their
    results. Returns the paths."""
    directory.mkdir(exist_ok=True)
    paths: dict[Path, dict[str, Any]] = {}
    for (server, scenario), some in sorted(_by_scenario(results).items()):
        path = directory / f"{server}.json"
        if path not in paths:
            paths[path] = json.loads(path.read_text()) if path.exists() else {}
        paths[path][scenario] = summary(some)
    for path, content in paths.items():
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return list(paths)
