"""`python -m faults.page`: the tables of `docs/guarantees.md`, made from `results/`.

There is a row for each scenario: the fault, the promises under it besides those that always hold, and the
results over all seeds and servers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from faults.scenarios import ALL

RESULTS: Final = Path(__file__).parent / "results"

_KEPT: Final = "no lease ends, no acknowledged write is lost"
_LOST: Final = "what live processes registered is back under the same ids; all else begins anew"
_TAIL: Final = "a resync where something was lost; owners write again what they had registered"
_PROMISES: Final = {
    "kill-always": _KEPT,
    "kill-everysec": _KEPT,
    "kill-none": _LOST,
    "power": _TAIL,
    "freeze": _KEPT,
    "pause": _KEPT,
    "wipe": _LOST,
    "flushall": _LOST,
    "structures": "as a wipe, whichever key it is",
    "lease-keys": "no lease ends: these keys are a hint",
    "save": "no lease ends; renewals come in time",
    "trim": "one resync, which shows the difference exactly",
    "drop-answers": "each write happens once, though it is sent again",
    "drop-requests": "a call fails within its time-out, or is sent again",
    "black-hole": "a call fails within its time-out; no change is missed afterwards",
    "stall": "what arrives late happens once, or is refused",
    "slow": "nothing is lost, however late it is",
    "half-close": "the connection is given up and made anew",
    "cut": "reading goes on where it was; no resync is needed",
    "refuse": "as cut, with growing pauses between attempts",
    "one-connection": "each connection is watched for itself",
    "client-kill": "as cut",
    "lost-notifications": "ended leases go all the same, by ticks",
    "no-notifications": "the same",
    "failover-equal": _TAIL,
    "failover-ahead": _TAIL + "; no lease ends by the clock",
    "failover-behind": _TAIL + "; no lease ends by the clock",
    "clock-steps": "no lease ends",
    "failover-planned": f"{_KEPT}; all is served 2 s after new connections reach the new primary",
    "full": "reads, deletes, watches and new readers are served; no lease ends",
    "misconf": "reads, watches and new readers are served; no lease ends",
    "lonely": "reads, watches and new readers are served; no lease ends",
    "rubbish": "it is passed over, and all is served",
    "slow-large": "every call is served; no lease ends",
    "mixed": "all of this at once",
    "sentinel-kill": _TAIL + "; no lease ends; all is served 2 s after a new primary is named",
    "sentinel-demoted": _TAIL + "; no lease ends; all is served 2 s after a new primary is named",
    "sentinel-away": f"{_KEPT}; every call is served",
    "cluster-kill": _TAIL + "; no lease ends; all is served 2 s after the replica took over",
    "cluster-demoted": _TAIL + "; no lease ends; all is served 2 s after the old master is a replica",
    "cluster-slots": f"{_KEPT}; every change is shown",
}
_OF_KINDS: Final = {
    "locks": "one accepted holder at a time; no stale write",
    "objects": "readers get the old version, the new one, or an error",
    "chats": "no chat fails; the list of workers is never empty",
    "exclusive": "one tenant a port, or the former one is told; a barrier's workers go on together or not",
}
_KINDS: Final = {
    "registry": "Registry",
    "sentinel": "Redis Sentinel",
    "cluster": "Redis Cluster",
    "locks": "Locks",
    "objects": "Objects",
    "chats": "Chats",
    "exclusive": "Ports and barriers",
}

_NUMBERS: Final = ("runs", "calls", "without an answer", "changes", "resyncs", "worst recovery", "broken")


def promise(scenario: str) -> str:
    """Return the promises under a scenario's faults. Raises KeyError."""
    kind, _, _ = scenario.partition("-")
    return _OF_KINDS[kind] if kind in _OF_KINDS else _PROMISES[scenario]


def table(results: Path = RESULTS) -> str:
    """Return the tables, in Markdown. Empty cells: not run on this machine."""
    measured = [json.loads(path.read_text()) for path in sorted(results.glob("*-*.json"))]
    lines: list[str] = []
    for kind, title in _KINDS.items():
        lines += [
            f"### {title}",
            "",
            f"| fault | promised | {' | '.join(_NUMBERS)} |",
            f"|---|---|{'--:|' * len(_NUMBERS)}",
        ]
        lines += (_row(name, [server[name] for server in measured if name in server]) for name in _of(kind))
        lines.append("")
    return "\n".join(lines)


def _of(kind: str) -> Iterator[str]:
    for name in ALL:
        first, _, _ = name.partition("-")
        if (first if first in _KINDS else "registry") == kind:
            yield name


def _row(name: str, measured: list[dict[str, Any]]) -> str:
    fault = (
        ALL[name]
        .summary.removeprefix(f"{name.partition('-')[0]}: ")
        .removeprefix("Sentinel: ")
        .removeprefix("Cluster: ")
    )
    runs = sum(len(one["seeds"]) for one in measured)
    if not runs:
        return f"| {fault} | {promise(name)} | | | | | | | |"
    sums = (
        sum(one[field] for one in measured) for field in ("calls", "unknown_calls", "log_entries", "resyncs")
    )
    worst = max(
        (one["worst_recovery_s"] for one in measured if one["worst_recovery_s"] is not None), default=None
    )
    broken = sum(sum(one["violations"].values()) for one in measured)
    cells = [fault, promise(name), str(runs), *(f"{value:,}" for value in sums)]
    return f"| {' | '.join(cells)} | {'–' if worst is None else f'{worst:.1f} s'} | {broken} |"


def losses(results: Path = RESULTS) -> str:
    """Return the figures of `faults.losses`, in Markdown."""
    path = results / "losses.json"
    lines = ["| setting | what happens | acknowledged | lost | within |", "|---|---|--:|--:|--:|"]
    for one in json.loads(path.read_text()) if path.exists() else ():
        numbers = f"{one['acknowledged']:,} | {one['lost']:,} | {one['window_s']:.1f} s"
        lines.append(f"| {one['setting']} | {one['fault']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{table()}\n{losses()}")  # noqa: T201
