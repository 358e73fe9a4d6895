"""The oracles on a real run's history: right as it is, and wrong once anything in it is changed.

Recorded by the fault harness: one writer, two workers, a watcher with three watches, FLUSHALL twice.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.history import Call, History, Note
from faults.oracles import ORACLES, keys, linear, watch

Event = list[Any]


@pytest.fixture
def recorded(repository: Path) -> History:
    return History.read(repository / "tests" / "vectors" / "flushall")


def test_recorded_run_is_right(recorded: History) -> None:
    assert [str(one) for name in ORACLES for one in ORACLES[name](recorded)] == []


# ---------------------------------------------------------------------- watches


def _batches(history: History) -> list[int]:
    ended_at = next(history.of("state")).at
    return [
        index
        for index, note in enumerate(history.notes)
        if note.kind == "watch" and note.at < ended_at and note.fields["events"]
    ]


def _with_events(note: Note, events: list[Event]) -> Note:
    return dataclasses.replace(note, fields={**note.fields, "events": events})


def _mutations(history: History, rng: random.Random) -> Iterator[tuple[str, History]]:
    """Yield the history with one change in each batch: one event dropped, two swapped, one repeated, a value
    or revision changed."""
    for index in rng.sample(_batches(history), 25):
        note = history.notes[index]
        events: list[Event] = note.fields["events"]
        place = rng.randrange(len(events))
        event = events[place]
        before, after = events[:place], events[place + 1 :]
        revised = [*event[:3], "1-1"] if event[0] == "put" else [*event[:2], "1-1", event[3]]
        mutants = {
            "dropped": [*before, *after],
            "twice": [*before, event, event, *after],
            "revised": [*before, revised, *after],
        }
        if event[0] == "put":
            mutants["changed"] = [*before, [*event[:2], "other", event[3]], *after]
        for name, mutant in mutants.items():
            notes = [*history.notes]
            notes[index] = _with_events(note, mutant)
            yield f"{name} {event} of {note}", History(history.calls, notes)


def test_each_mutation_of_a_recorded_watch_is_found(recorded: History) -> None:
    unseen = [what for what, mutant in _mutations(recorded, random.Random(1)) if not watch.check(mutant)]
    assert unseen == []


def test_swapped_batches_of_a_recorded_watch_are_found(recorded: History) -> None:
    changes = [index for index in _batches(recorded) if recorded.notes[index].fields["resync"] is None]
    by_watch: dict[str, list[int]] = {}
    for index in changes:
        by_watch.setdefault(recorded.notes[index].fields["watch"], []).append(index)
    for indexes in by_watch.values():
        one, other = indexes[len(indexes) // 2], indexes[len(indexes) // 2 + 1]
        notes = [*recorded.notes]
        notes[one], notes[other] = notes[other], notes[one]
        assert watch.check(History(recorded.calls, notes))


# ---------------------------------------------------------------------- calls and the final state


def _mutated_reads(history: History) -> Iterator[tuple[Call, History]]:
    """Yield the history with one change in each read that found a value: it returns the value before."""
    latest: dict[str, dict[str, str]] = {}
    for index, call in enumerate(history.calls):
        if call.action != "get" or call.outcome != "ok":
            continue
        key, answer = call.arguments["key"], call.answer
        before, latest[key] = latest.get(key), answer
        if answer["value"] and before is not None and before != answer:
            calls = [*history.calls]
            calls[index] = dataclasses.replace(call, answer=before)
            yield call, History(calls, history.notes)


def test_each_older_answer_in_a_recorded_read_is_found(recorded: History) -> None:
    mutants = list(_mutated_reads(recorded))
    assert len(mutants) >= 5
    assert [call for call, mutant in mutants if not linear.check(mutant)] == []


def _mutated_states(history: History) -> Iterator[tuple[str, History]]:
    """Yield the history with one change in the final state: a worker's key missing, another value, another
    lease, one key too many."""
    (index,) = (index for index, note in enumerate(history.notes) if note.kind == "state")
    state = history.notes[index]
    records: dict[str, list[str | None]] = state.fields["records"]
    for key in (key for key in records if key.startswith("instances/")):
        value, lease, revision = records[key]
        others = {one: record for one, record in records.items() if one != key}
        mutants: dict[str, dict[str, list[str | None]]] = {
            "missing": others,
            "another value": {**others, key: ["other", lease, revision]},
            "another lease": {**others, key: [value, "0", revision]},
            "too many": {**records, f"{key}x": [value, lease, revision]},
        }
        for name, mutant in mutants.items():
            notes = [*history.notes]
            notes[index] = dataclasses.replace(state, fields={**state.fields, "records": mutant})
            yield f"{key} {name}", History(history.calls, notes)


def test_each_change_of_the_recorded_final_state_is_found(recorded: History) -> None:
    mutants = list(_mutated_states(recorded))
    assert len(mutants) >= 8
    assert [what for what, mutant in mutants if not keys.check(mutant)] == []
    assert [what for what, mutant in mutants if "lease" not in what and not watch.check(mutant)] == []
