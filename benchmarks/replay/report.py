"""The output of a replay: a table for people, `results/replay.json` for programs and for the picture."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.harness.report import RESULTS, machine
from benchmarks.replay.figures import Figures, figures
from benchmarks.replay.oracle import Difference, wrong_share
from benchmarks.replay.plan import MODES, Plan
from benchmarks.replay.run import RunResult

PATH: Final = RESULTS / "replay.json"
OMNISCIENT: Final = "omniscient"
"""The mode of the simulated reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row: the conditions of a run, and its figures. Times are the trace's seconds unless said
    otherwise."""

    trace: str
    arrivals: str
    mode: str
    replicas: int
    fault: str | None
    requests: int
    workers: int
    kv_blocks: int
    load: float | None
    """None: the trace's own arrivals."""
    speedup: float
    """1 for simulated runs."""
    hit_rate: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    imbalance: float
    events_per_s: float | None
    """KV events of all workers, in real time."""
    wrong_share: float | None
    """Part of the tokens that routers believed cached and workers did not find; None where there was no
    belief."""
    index: str | None
    """The routers' indexes against the caches once there was no more traffic: `equal`, or the difference."""
    failed_count: int
    lost_count: int
    late_ms: float | None
    """Delay with which requests were sent, real time, 99th percentile."""
    cores: float | None
    """CPU seconds a second of workers and routers."""
    machine: str
    repeats: int = 1
    """Runs that the figures are means of, each with arrivals and chance of its own."""
    hit_rate_spread: float | None = None
    """Standard deviation of the hit rate between them."""

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of a row. Rows of the same key replace each other."""
        return (self.trace, self.arrivals, self.mode, self.replicas, self.fault)


def simulated_entry(plan: Plan, trace: str, all_figures: Sequence[Figures], *, mode: str) -> Entry:
    """Make the row of simulated runs: means over them. `mode` is the plan's, or OMNISCIENT."""
    replicas = 1 if mode == OMNISCIENT else plan.replicas
    return _entry(plan, trace, all_figures, mode=mode, replicas=replicas, speedup=1.0)


def run_entry(plan: Plan, trace: str, fault: str | None, results: Sequence[RunResult]) -> Entry:
    """Make the row of one way of routing: means over its runs, the sum of the failures, and the greatest
    lateness."""
    thought = plan.client_mode is None
    length_s = sum(result.length_s for result in results)
    return _entry(
        plan,
        trace,
        [figures(result.outcomes, plan.workers) for result in results],
        fault=fault,
        events_per_s=sum(result.events_count for result in results) / length_s if plan.mode == "kv" else None,
        wrong_share=wrong_share([one for result in results for one in result.outcomes]) if thought else None,
        index=_index([one for result in results for one in result.differences]),
        failed_count=sum(sum(result.failed.values()) for result in results),
        lost_count=sum(result.lost_count for result in results),
        late_ms=1e3 * max(result.late_s for result in results),
        cores=sum(result.cpu_s for result in results) / length_s,
    )


def _entry(plan: Plan, trace: str, all_figures: Sequence[Figures], **more: Any) -> Entry:
    mean = {
        field.name: statistics.fmean(getattr(one, field.name) for one in all_figures)
        for field in fields(Figures)
    }
    rates = [one.hit_rate for one in all_figures]
    values: dict[str, Any] = {
        "trace": trace,
        "arrivals": plan.arrivals,
        "mode": plan.mode,
        "replicas": plan.replicas,
        "fault": None,
        "workers": plan.workers,
        "kv_blocks": plan.kv_blocks,
        "load": plan.load if plan.arrivals == "poisson" else None,
        "speedup": plan.speedup,
        "events_per_s": None,
        "wrong_share": None,
        "index": None,
        "failed_count": 0,
        "lost_count": 0,
        "late_ms": None,
        "cores": None,
        "machine": machine(),
        "repeats": len(all_figures),
        "hit_rate_spread": round(statistics.stdev(rates), 5) if len(rates) > 1 else None,
    }
    measured = {name: round(value, 5) for name, value in mean.items()}
    measured["requests"] = round(mean["requests"])
    return Entry(**(values | measured | more))


def _index(differences: Sequence[Difference]) -> str | None:
    if not differences:
        return None
    if all(one.equal for one in differences):
        return "equal"
    missing = max(one.missing_count for one in differences)
    wrong = max(one.wrong_count for one in differences)
    return f"{missing} missing, {wrong} wrong of {differences[0].block_count}"


# --------------------------------------------------------------------------- files and tables


def load_entries(path: Path = PATH) -> list[Entry]:
    """Return all saved rows, the newest of each kind."""
    return [Entry(**one) for one in json.loads(path.read_text())] if path.exists() else []


def save(entries: Iterable[Entry], path: Path = PATH) -> None:
    """Write rows; those that did not run keep their earlier figures."""
    merged = {entry.key: entry for entry in (*load_entries(path), *entries)}
    rows = [asdict(row) for row in ordered(merged.values())]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """Return the rows in the order of the table: each trace's arrivals together, runs with faults at their
    end."""
    modes = [OMNISCIENT, *MODES]

    def place(one: Entry) -> tuple[object, ...]:
        is_given = one.arrivals == "given"
        return one.trace, is_given, one.fault or "", modes.index(one.mode), one.replicas

    return sorted(entries, key=place)


COLUMNS: Final = (
    "run",
    "hit rate",
    "÷ best",
    "TTFT mean",
    "÷ best",
    "p50",
    "p99",
    "balance",
    "events/s",
    "wrong",
    "index",
    "failed + lost",
    "late ms",
    "cores",
)


def title(entry: Entry) -> str:
    """Return a short title of the run."""
    arrivals = "as given" if entry.load is None else f"Poisson {entry.load:g}"
    if entry.mode == OMNISCIENT:
        return f"{arrivals}, omniscient"
    mode = next(shown for name, shown in MODES.items() if name == entry.mode)
    return f"{arrivals}, {mode} × {entry.replicas}{f', {entry.fault} killed' if entry.fault else ''}"


def cells(entry: Entry, reference: Entry | None) -> list[str]:
    """Return a row of the table, by `COLUMNS`."""

    def ratio(name: str) -> str:
        return "–" if reference is None else f"{getattr(entry, name) / getattr(reference, name):.2f}"

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        title(entry),
        f"{entry.hit_rate:.3f}"
        + ("" if entry.hit_rate_spread is None else f" ± {entry.hit_rate_spread:.3f}"),
        ratio("hit_rate"),
        f"{entry.ttft_mean_s:.2f}",
        ratio("ttft_mean_s"),
        f"{entry.ttft_p50_s:.2f}",
        f"{entry.ttft_p99_s:.2f}",
        f"{entry.imbalance:.2f}",
        shown(entry.events_per_s, ".0f"),
        shown(entry.wrong_share, ".1%"),
        entry.index or "–",
        f"{entry.failed_count} + {entry.lost_count}",
        shown(entry.late_ms, ".0f"),
        shown(entry.cores, ".1f"),
    ]


def print_table(entries: Sequence[Entry], conditions: Sequence[str]) -> None:
    """Print the table on the terminal."""
    console = Console(width=max(170, Console().width))
    table = Table(caption="\n".join([*conditions, machine()]), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for entry in ordered(entries):
        table.add_row(*cells(entry, _reference(entry, entries)))
    console.print(table)


def markdown(entries: Sequence[Entry]) -> str:
    """Return the table in Markdown for the README."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cells(entry, _reference(entry, entries)))} |" for entry in entries]
    return "\n".join(lines)


def _reference(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    for other in entries:
        if other.mode == OMNISCIENT and (other.trace, other.arrivals) == (entry.trace, entry.arrivals):
            return other
    return None


if __name__ == "__main__":
    wanted = sys.argv[1:]
    print(markdown([entry for entry in load_entries() if not wanted or entry.trace in wanted]))
