"""Judges a run's directory: `python -m faults.judge DIRECTORY` prints the oracles' findings, and exits 1 if
there are any.

It is a program of its own. So judging one run does not delay another that is under way, and a kept history
can be judged again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from faults.history import History
from faults.oracles import ORACLES


def findings(history: History) -> Iterator[tuple[str, str]]:
    """Yield the broken promises as (oracle, report)."""
    yield from _of_recovery(history)
    yield from _of_leases(history)
    for check in ORACLES.values():
        yield from ((violation.oracle, violation.report()) for violation in check(history))


def _of_recovery(history: History) -> Iterator[tuple[str, str]]:
    for note in history.of("quiet"):
        if note.fields["seconds"] is None:
            why = next((note.fields["why"] for note in history.of("restless")), "")
            yield "recovery", f"[recovery] {note.at:.6f}: not everything agreed in time: {why}"


def _of_leases(history: History) -> Iterator[tuple[str, str]]:
    """Yield the lost leases of processes that were not stopped beyond the TTL, if the faults may cost no
    lease."""
    if not any(note.fields["keeps_leases"] for note in history.of("began")):
        return
    stopped = {note.fields["process"] for note in history.of("frozen")}
    for note in history.of("lease_lost"):
        if note.process not in stopped:
            yield "leases", f"[leases] {note.at:.6f} {note.process}: lost its lease though it lived"


def main() -> None:
    """Judge one directory."""
    parser = argparse.ArgumentParser(prog="python -m faults.judge", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", action="store_true", help="print a JSON list of [oracle, line]")
    arguments = parser.parse_args()
    found = list(findings(History.read(arguments.directory)))
    if arguments.json:
        sys.stdout.write(json.dumps(found))
    else:
        for _, line in found:
            sys.stdout.write(f"{line}\n")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
