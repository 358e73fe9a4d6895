"""Members: the instances in a caller's table.

Each `members` note is the table of one watcher at one moment: `ids`, the instances that it would send
requests to, in the form of leases. A wiped registry never empties the table; in the end it holds the live
workers.
"""

from __future__ import annotations

from typing import Final

from faults.history import History, Note
from faults.oracles.fates import Fates
from faults.oracles.violation import Violation, shorten, show

NEVER_EMPTY: Final = "losing the registry never empties a caller's table while workers live"
TRUE_END: Final = "once the run is quiet, a caller's table holds the live workers"


def check(history: History) -> list[Violation]:
    """Check all tables of a run. Workers are the processes whose `started` note says so."""
    fates = Fates(history)
    workers = {note.process: note for note in history.of("started") if note.fields.get("role") == "worker"}
    live = {lease for name in workers if fates.is_present(name) for lease in fates.leases[name]}
    dead = {lease for name in workers if fates.of(name) == "dead" for lease in fates.leases[name]}
    violations: list[Violation] = []
    last: dict[str, Note] = {}
    filled: set[str] = set()
    for note in history.of("members"):
        ids = set(note.fields["ids"])
        if not ids and note.process in filled and live and note.at <= fates.ended_at:
            what = f"the table of {note.process} was emptied, while {len(live)} workers lived on"
            before = last[note.process]
            violations.append(
                Violation("members", NEVER_EMPTY, what, note.at, note.process, show(before, note))
            )
        if ids:
            filled.add(note.process)
        last[note.process] = note
    for note in last.values():
        violations += _check_end(note, live, dead)
    return violations


def _check_end(note: Note, live: set[str], dead: set[str]) -> list[Violation]:
    ids = set(note.fields["ids"])
    missing, left = sorted(live - ids), sorted(ids & dead)
    if not missing and not left:
        return []
    wrong = f"lacks live {shorten(missing) or 'none'}, holds dead {shorten(left) or 'none'}"
    what = f"the table of {note.process} {wrong}"
    return [Violation("members", TRUE_END, what, note.at, note.process, show(note))]
