"""Watches: every change in one order, or a resync that leaves the watcher exactly at the server's state.

The events of each watch are compared with the truth. Between two resyncs they must be a run of the log's
entries under its prefix, without a gap, a repetition or an invented entry, on one line of history. A resync's
events must be the difference by value between the watch's state before and the true state at the resync's
revision. In the end the watch must be at the server's state.

Two known differences are no faults. A record whose lease has run out, but whose end is not logged yet, is not
shown in a snapshot; the expiry that comes later is not shown either. And the line of history to which a
revision belongs may be open for a while, as the same id can stand on two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from faults.history import History, Note
from faults.oracles.fates import Fates
from faults.oracles.truth import CAUSES, Entry, Truth
from faults.oracles.violation import Violation, shorten, show

GAPLESS = "a watch shows every change under its prefix once, in the log's order, or a resync"
EXACT = "a resync (and a watch's first state) is exactly the difference to the server's state, by value"
TRUE_END = "once the run is quiet, a watch has shown the server's state"
LOGGED = "the change log leads to exactly the records that the server holds"


@dataclass(frozen=True, slots=True)
class Event:
    """One event as a watch showed it; `value` is None for a delete, `cause` for a put."""

    key: str
    revision: str
    value: str | None = None
    cause: str | None = None

    @classmethod
    def read(cls, fields: Sequence[Any]) -> Event:
        """Return the event of a note."""
        if fields[0] == "put":
            return cls(fields[1], fields[3], value=fields[2])
        return cls(fields[1], fields[2], cause=fields[3])

    def is_of(self, entry: Entry) -> bool:
        """Return whether it shows this log entry."""
        if self.key != entry.key or self.revision != entry.id:
            return False
        return (
            entry.is_put and self.value == entry.value
            if self.cause is None
            else CAUSES.get(entry.kind) == self.cause
        )

    def __str__(self) -> str:
        what = f"put {self.key} = {self.value}" if self.cause is None else f"{self.cause} {self.key}"
        return f"{self.revision} {what}"


class Line:
    """The log as one prefix sees it. An entry that it does not see stands for the last visible one before;
    the beginning of a history is visible to all prefixes."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._last: dict[Entry, Entry] = {}

    def sees(self, entry: Entry) -> bool:
        """Return whether an entry changes a key under the prefix, or begins a history."""
        return entry.parent is None or (
            entry.key.startswith(self._prefix) and (entry.is_put or entry.is_delete)
        )

    def last(self, entry: Entry) -> Entry:
        """Return the last visible entry, this one or before it."""
        passed = []
        at = entry
        while at not in self._last and not self.sees(at):
            passed.append(at)
            assert at.parent is not None
            at = at.parent
        found = self._last.setdefault(at, at)
        for one in passed:
            self._last[one] = found
        return found

    def before(self, entry: Entry) -> Iterator[Entry]:
        """Yield the visible entries before one, latest first."""
        while entry.parent is not None:
            entry = self.last(entry.parent)
            yield entry


class WatchCheck:
    """One watch's history. `places` are the positions in the log at which it may stand; empty: not known."""

    def __init__(self, truth: Truth, line: Line, prefix: str) -> None:
        self.view: dict[str, str] = {}
        self.last_note: Note | None = None
        self.violations: list[Violation] = []
        self._truth = truth
        self._line = line
        self._prefix = prefix
        self._places: list[Entry] = []
        self._shown: set[Entry] = set()
        self._starts_with_state = True

    def start_at(self, revision: str, view: dict[str, str] | None) -> None:
        """Start behind a revision, without a first state; with another watch's view if one is given."""
        self._starts_with_state = False
        entries = self._truth.by_id.get(revision, [])
        self._places = [self._line.last(entry) for entry in entries]
        if view is not None:
            self.view = dict(view)
        elif entries:
            self.view = {key: put.value for key, put in self._truth.state(entries[-1], self._prefix).items()}

    def apply_batch(self, note: Note) -> None:
        """Apply the next batch."""
        events = [Event.read(fields) for fields in note.fields["events"]]
        is_state = note.fields["resync"] is not None or (self._starts_with_state and self.last_note is None)
        if is_state:
            self._apply_state(note, events)
        else:
            for event in events:
                self._apply_change(note, event)
            self._check_revision(note)
        self.last_note = note

    def finish(self, state: Note) -> None:
        """Compare with the server's final state."""
        records = state.fields["records"]
        held = {key: fields[0] for key, fields in records.items() if key.startswith(self._prefix)}
        if self.last_note is None:
            self._report(state, "has never shown anything, not even an empty state", TRUE_END)
        elif wrong := _difference(self.view, held):
            note = self.last_note
            self._report(
                note, f"differs from the server in the end: {shorten(wrong)}", TRUE_END, wrong, at=state.at
            )

    # ------------------------------------------------------------------ states and resyncs

    def _apply_state(self, note: Note, events: list[Event]) -> None:
        what = "its first state" if note.fields["resync"] is None else f"a resync ({note.fields['resync']})"
        entries = self._truth.by_id.get(note.fields["revision"], [])
        wrongs = [self._wrong_difference(entry, note.fields["revision"], events) for entry in entries]
        if not entries:
            self._report(
                note, f"{what} has revision {note.fields['revision']}, which the log never had", EXACT
            )
        elif all(wrongs):
            least = min(wrongs, key=len)
            self._report(note, f"{what} at {note.fields['revision']}: {shorten(least, 3)}", EXACT, least)
        right = [entry for entry, wrong in zip(entries, wrongs, strict=True) if not wrong] or entries
        self._places = [self._line.last(entry) for entry in right]
        for event in events:
            self._apply(event)

    def _wrong_difference(self, entry: Entry, revision: str, events: list[Event]) -> list[str]:
        state = self._truth.state(entry, self._prefix)
        by_key = {event.key: event for event in events}
        wrong = [f"{event} was shown twice" for event in events if by_key[event.key] is not event]
        for key, event in by_key.items():
            stands = state.get(key)
            if event.cause is not None:
                wrong += self._wrong_delete(event, stands, revision)
            elif stands is None or not event.is_of(stands):
                wrong.append(f"it showed {event}, but the truth was {stands or 'its absence'}")
            elif self.view.get(key) == event.value:
                wrong.append(f"it showed {event}, which it had shown before")
        for key, stands in state.items():
            is_hidden = key not in self.view and self._truth.may_have_ended(stands)
            if key not in by_key and self.view.get(key) != stands.value and not is_hidden:
                wrong.append(f"it did not show {stands}; shown before was {self.view.get(key)}")
        gone = self.view.keys() - state.keys() - by_key.keys()
        return wrong + [f"it did not show that {key} is gone" for key in sorted(gone)]

    def _wrong_delete(self, event: Event, stands: Entry | None, revision: str) -> list[str]:
        if event.key not in self.view:
            return [f"it showed {event}, though it had never shown that key"]
        if stands is not None and not self._truth.may_have_ended(stands):
            return [f"it showed {event}, but {stands} stands"]
        if event.cause != "resync" or event.revision != revision:
            return [f"it showed {event}; a resync's delete has the cause resync and the resync's revision"]
        return []

    # ------------------------------------------------------------------ changes

    def _apply_change(self, note: Note, event: Event) -> None:
        entries = [entry for entry in self._truth.by_id.get(event.revision, []) if event.is_of(entry)]
        right = [entry for entry in entries if self._follows(entry)]
        if not entries:
            had = self._truth.by_id.get(event.revision, ["nothing"])
            self._report(
                note, f"showed {event}, which the log does not have; it has there: {had[0]}", GAPLESS
            )
        elif right or not self._places:
            self._places = right or entries
        else:
            self._report_misplaced(note, event, entries[-1])
        self._shown.update(entries)
        self._apply(event)

    def _follows(self, entry: Entry) -> bool:
        """Return whether no visible entry lies between the watch's position and this one."""
        return any(before in self._places for before in self._up_to_visible(self._line.before(entry)))

    def _up_to_visible(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """Yield entries until (and with) the first that had to be shown. The expiry of a record that was not
        shown had not."""
        for entry in entries:
            yield entry
            if not self._is_unseen_expiry(entry):
                return

    def _is_unseen_expiry(self, entry: Entry) -> bool:
        return entry.kind == "x" and entry.key not in self.view

    def _report_misplaced(self, note: Note, event: Event, entry: Entry) -> None:
        place = self._places[-1]
        between: list[Entry] = []
        for before in self._line.before(entry):
            if before is place:
                break
            between.append(before)
        else:
            self._report_off_line(note, event, entry, place)
            return
        lost = [str(one) for one in reversed(between) if not self._is_unseen_expiry(one)]
        self._report(note, f"showed {event} without {shorten(lost, 3)} before it", GAPLESS, lost)
        self._places = [entry]

    def _report_off_line(self, note: Note, event: Event, entry: Entry, place: Entry) -> None:
        if entry in self._shown:
            what = f"showed {event} again"
        elif entry in self._line.before(place):
            what = f"showed {event} too late, behind {place}"
        else:
            what = f"went from {place} to {event}, which is on another line of history, without a resync"
            self._places = [entry]
        self._report(note, what, GAPLESS)

    def _check_revision(self, note: Note) -> None:
        """Check that no entry had to be shown between the batch's last event and its revision."""
        entries = self._truth.by_id.get(note.fields["revision"], [])
        if not entries:
            self._report(note, f"claims revision {note.fields['revision']}, which the log never had", GAPLESS)
        elif self._places and not any(
            before in self._places
            for visible in map(self._line.last, entries)
            for before in self._up_to_visible(itertools.chain([visible], self._line.before(visible)))
        ):
            last = self._line.last(entries[-1])
            if last.incarnation == self._places[-1].incarnation:
                what = f"claims revision {note.fields['revision']} but never showed {last}"
            else:
                what = f"went from {self._places[-1]} to {last}, without a resync"
            self._report(note, what, GAPLESS)
            self._places = [last]

    def _apply(self, event: Event) -> None:
        if event.value is not None:
            self.view[event.key] = event.value
        else:
            self.view.pop(event.key, None)

    def _report(
        self, note: Note, what: str, promise: str, lines: Sequence[str] = (), *, at: float | None = None
    ) -> None:
        """Add a violation that `note` shows, after `lines` of the history; `at` is its time, by default the
        note's."""
        watch = note.fields.get("watch", "a watch")
        shown = [note] if self.last_note is None or self.last_note is note else [self.last_note, note]
        self.violations.append(
            Violation(
                oracle="watch",
                promise=promise,
                what=f"watch {watch} of {self._prefix!r} {what}",
                at=note.at if at is None else at,
                process=note.process,
                lines=(*lines, *show(*shown)),
            )
        )


def check(history: History) -> list[Violation]:
    """Check all watches of a run, and the log against the final state."""
    truth, fates = Truth.of(history), Fates(history)
    violations = [_torn(entry) for entry in truth.torn]
    state = next(history.of("state"), None)
    if state is not None:
        violations += _check_log(truth, state)
    checks = _follow(history, truth, fates.ended_at)
    ended = {note.fields["watch"] for note in history.of("unwatched")}
    for watch, (process, checked) in checks.items():
        if state is not None and watch not in ended and fates.is_present(process):
            checked.finish(state)
        violations += checked.violations
    return violations


def _follow(history: History, truth: Truth, ended_at: float) -> dict[str, tuple[str, WatchCheck]]:
    checks: dict[str, tuple[str, WatchCheck]] = {}
    lines: dict[str, Line] = {}
    for note in history.of("watching", "watch"):
        if note.at > ended_at:
            break
        watch, prefix = note.fields["watch"], note.fields["prefix"]
        if watch not in checks:
            line = lines.setdefault(prefix, Line(prefix))
            checks[watch] = (note.process, WatchCheck(truth, line, prefix))
        checked = checks[watch][1]
        if note.kind == "watch":
            checked.apply_batch(note)
        elif note.fields.get("start_revision"):
            resumed = checks.get(note.fields.get("resumes") or "")
            checked.start_at(note.fields["start_revision"], resumed[1].view if resumed else None)
    return checks


def _check_log(truth: Truth, state: Note) -> list[Violation]:
    held = {key: f"{fields[0]} @ {fields[2]}" for key, fields in state.fields["records"].items()}
    entries = truth.by_id.get(state.fields["revision"], [])
    wrongs = [
        _difference({key: f"{put.value} @ {put.id}" for key, put in truth.state(entry, "").items()}, held)
        for entry in entries
    ]
    if any(not wrong for wrong in wrongs):
        return []
    wrong = min(wrongs, key=len, default=[f"the log never had revision {state.fields['revision']}"])
    what = f"log and state of server {state.fields['server']} differ: {shorten(wrong, 3)}"
    return [Violation("watch", LOGGED, what, state.at, state.process, tuple(wrong))]


def _difference(shown: dict[str, str], held: dict[str, str]) -> list[str]:
    keys = sorted(key for key in shown.keys() | held.keys() if shown.get(key) != held.get(key))
    return [f"{key} = {shown.get(key)}, on the server {held.get(key)}" for key in keys]


def _torn(entry: Entry) -> Violation:
    previous = entry.note.fields["previous"]
    what = f"the observer never saw {previous}, which comes before {entry}: the run cannot be judged"
    return Violation("watch", "the observer sees the whole log", what, entry.note.at, entry.note.process)
