"""Registered keys: in the end the keys of each live process stand, with its last value, under its lease; and
no others.

After a call of unknown outcome: a failed registration leaves no key; an update the new value (or, where the
registration was lost meanwhile, the old); a failed unregistration leaves the key or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from faults.history import Call, History, Note
from faults.oracles.fates import Fates
from faults.oracles.violation import Violation, shorten, show

PREFIX: Final = "instances/"
ACTIONS: Final = frozenset({"register", "update", "unregister"})

STANDS: Final = "a live process's registered key stands in the registry, with its last value, under its lease"
NONE_LEFT: Final = "no key stands that no live process keeps"
ONE_OWNER: Final = "an exclusive key has one owner; a process that lost it is told"
LOST_FOR_CAUSE: Final = "a key is reported lost only when another process deleted it, or wrote it first"
GOES_ON: Final = "losing Redis never ends a process"


@dataclass(slots=True)
class Kept:
    """The expected state of one process's key. `values` are those that may stand; none: it is not kept.

    `may_be_gone`: it may also be gone.
    """

    process: str
    key: str
    values: list[str] = field(default_factory=list)
    may_be_gone: bool = False
    events: list[Call | Note] = field(default_factory=list)

    def apply(self, event: Call | Note) -> None:
        """Apply the next event of the key."""
        self.events.append(event)
        if isinstance(event, Note):
            self.values, self.may_be_gone = [], False
        elif event.action == "register":
            if event.outcome == "ok":
                self.values, self.may_be_gone = [event.arguments["value"]], False
        elif event.action == "update" and event.outcome != "refused":
            value = event.arguments["value"]
            self.values = [value] if event.outcome == "ok" else [*self.values, value]
        elif event.action == "unregister":
            self.may_be_gone = event.outcome != "ok"
            self.values = [] if event.outcome == "ok" else self.values


def check(history: History) -> list[Violation]:
    """Check the keys in the final state; without a final state, only the reported losses."""
    fates = Fates(history)
    kept = _follow(history, fates.ended_at)
    violations = [
        Violation(
            "keys",
            GOES_ON,
            f"{process} was not killed, but was not there at the end",
            fates.since(process),
            process,
        )
        for process in fates.vanished()
    ]
    violations += _check_losses(history, fates.ended_at)
    state = next(history.of("state"), None)
    if state is not None:
        violations += _check_state(kept, state, fates)
    return violations


def _follow(history: History, ended_at: float) -> list[Kept]:
    """Return the keys that each process keeps, by its calls in the order of their ends, and by the reported
    losses.

    A process makes one call after the other on a key. So a call of unknown outcome had ended for it before
    the next began.
    """
    events: list[tuple[float, Call | Note]] = []
    next_began_at: dict[tuple[str, str], float] = {}
    for call in reversed(history.calls):
        if call.action in ACTIONS and call.began_at < ended_at:
            owned = (call.process, call.arguments["key"])
            events.append((min(call.ended_at, next_began_at.get(owned, ended_at)), call))
            next_began_at[owned] = call.began_at
    events.reverse()
    events += [(note.at, note) for note in history.of("lost") if note.at < ended_at]
    kept: dict[tuple[str, str], Kept] = {}
    for _, event in sorted(events, key=lambda timed: timed[0]):
        key = event.arguments["key"] if isinstance(event, Call) else event.fields["key"]
        kept.setdefault((event.process, key), Kept(event.process, key)).apply(event)
    return list(kept.values())


# ---------------------------------------------------------------------- the final state


def _check_state(kept: list[Kept], state: Note, fates: Fates) -> list[Violation]:
    records: Mapping[str, Any] = state.fields["records"]
    owners: defaultdict[str, list[Kept]] = defaultdict(list)
    for one in kept:
        fate = fates.of(one.process)
        if one.values and (fates.is_present(one.process) or fate == "stopped"):
            owners[one.key].append(one)
    violations = []
    for key, some in owners.items():
        sure = [one for one in some if fates.of(one.process) == "live" and not one.may_be_gone]
        if len(sure) > 1:
            violations.append(_report_owners(key, sure, state))
        elif sure:
            violations += _check_kept(sure[0], records.get(key), state, fates)
    known: defaultdict[str, list[Kept]] = defaultdict(list)
    for one in kept:
        known[one.key].append(one)
    for key, record in records.items():
        if key.startswith(PREFIX) and key not in owners:
            violations.append(_report_left(key, record, known[key], state, fates))
    return violations


def _check_kept(one: Kept, record: Any, state: Note, fates: Fates) -> list[Violation]:
    leases = fates.leases[one.process]
    if record is None:
        what = f"{one.key} of live {one.process} is missing; it should hold {one.values[-1]}"
    elif record[0] not in one.values:
        what = f"{one.key} of live {one.process} holds {record[0]}; it should hold {one.values[-1]}"
    elif record[1] is None or (leases and record[1] not in leases):
        what = (
            f"{one.key} of live {one.process} stands under lease {record[1]}, not its own {shorten(leases)}"
        )
    else:
        return []
    return [Violation("keys", STANDS, what, state.at, one.process, show(*one.events))]


def _report_owners(key: str, owners: list[Kept], state: Note) -> Violation:
    names = shorten(sorted(one.process for one in owners))
    events = [event for one in owners for event in one.events]
    what = f"{key} is kept by {names}, and none of them was told that it is lost"
    return Violation("keys", ONE_OWNER, what, state.at, owners[0].process, show(*events))


def _report_left(key: str, record: Any, known: list[Kept], state: Note, fates: Fates) -> Violation:
    whose = [f"{one.process} ({fates.of(one.process)})" for one in known] or ["no process"]
    what = (
        f"{key} = {record[0]} under lease {record[1]} stands, but is not kept; registered by {shorten(whose)}"
    )
    events = [event for one in known for event in one.events]
    return Violation("keys", NONE_LEFT, what, state.at, known[0].process if known else "?", show(*events))


# ---------------------------------------------------------------------- losses and ends


def _check_losses(history: History, ended_at: float) -> list[Violation]:
    """Check that each reported loss was caused by another process."""
    violations = []
    for note in history.of("lost"):
        if not note.fields["key"].startswith(PREFIX):
            continue
        if note.at < ended_at and not any(_took(call, note) for call in history.calls):
            reason = note.fields["reason"]
            what = f"was told that {note.fields['key']} is lost ({reason}), but no process took it"
            violations.append(Violation("keys", LOST_FOR_CAUSE, what, note.at, note.process, show(note)))
    return violations


def _took(call: Call, lost: Note) -> bool:
    if call.began_at > lost.at or call.outcome == "refused":
        return False
    key, arguments = lost.fields["key"], call.arguments
    if call.action == "transact":
        return key in arguments["deletes"] or any(key == put for put, _ in arguments["puts"])
    takes = {"delete", "put", "create", "compare_and_put"}
    is_others = call.action == "register" and call.process != lost.process
    return arguments.get("key") == key and (call.action in takes or is_others)
