"""Linearizability of the registry's reads, writes and transactions.

All calls on a key must fit one order, in which each took effect between its begin and its end. Keys are
judged one by one, unless a transaction joins them. A call of unknown outcome may take effect at any time
after it began, or never. Stretches between losses of data (`losses.py`) are judged apart. The state of the
registers is unknown at the beginning of each.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from dynamo_redis.store.registry.change_log import order
from faults.history import Call, History
from faults.oracles.fates import Fates
from faults.oracles.losses import Losses
from faults.oracles.registers import (
    ABSENT,
    ACTIONS,
    ANYTHING,
    WRITES,
    Attribution,
    Cell,
    Operation,
    operation_of,
)
from faults.oracles.search import Result, Search
from faults.oracles.violation import Violation, shorten, show

LINEAR: Final = "calls on keys are linearizable: they fit one order, each between its begin and its end"
ONE_REVISION: Final = "a write has one revision, and a key at a revision one value"
RISING: Final = "a write that begins after another has ended has a later revision"
WRITTEN: Final = "a value is read only after a call has begun to write it"
DECIDED: Final = "the history can be judged"


def check(history: History) -> list[Violation]:
    """Check all calls on plain keys of a run."""
    ended_at = Fates(history).ended_at
    calls = [call for call in history.calls if call.action in ACTIONS and call.began_at < ended_at]
    losses = Losses(history)
    violations = _check_written(calls)
    for number, (begin, end) in enumerate(losses.stretches()):
        answered = [operation_of(call) for call in calls if _is_answered_in(call, begin, end)]
        unknown = [
            operation_of(replace(call, outcome="unknown", answer=None))
            for call in calls
            if _may_act_in(call, begin, end)
        ]
        attribution = Attribution([*answered, *unknown])
        violations += [_report_conflict(*pair) for pair in attribution.conflicts]
        violations += _check_refusals(answered)
        violations += _check_rising(answered)
        answered = [attribution.complete(operation) for operation in answered]
        unknown = [attribution.complete(operation) for operation in unknown]
        unknown = _observable(unknown, answered)
        for keys in partition([*answered, *unknown]):
            some = operations_on(keys, answered)
            initial: Cell = ABSENT if number == 0 else ANYTHING
            result = Search(sorted(keys), some, operations_on(keys, unknown), initial).run()
            if not result.found:
                violations.append(_report_stuck(sorted(keys), some, result))
    return violations


def _is_answered_in(call: Call, begin: float, end: float) -> bool:
    return call.outcome != "unknown" and begin <= call.began_at and call.ended_at <= end


def _may_act_in(call: Call, begin: float, end: float) -> bool:
    """Return whether a write may have had an effect in this stretch that its answer does not show."""
    if call.action not in WRITES or call.outcome == "refused" or _is_answered_in(call, begin, end):
        return False
    return call.began_at < end and call.ended_at > begin


# ---------------------------------------------------------------------- one order for some keys


def _report_stuck(keys: list[str], answered: list[Operation], result: Result) -> Violation:
    stuck = [operation.call for operation in result.stuck]
    first = min(stuck, key=lambda call: call.ended_at)
    state = ", ".join(
        f"{key} was {_name(cell)}" for key, cell in zip(keys, result.state, strict=True) if cell != ANYTHING
    )
    fits = f"{result.count} of {len(answered)} calls fit one order, after which {state or 'nothing is known'}"
    if result.found is None:
        what = f"UNDECIDED, too many orders of calls on {shorten(keys)} to try: at best {fits}"
    else:
        what = (
            f"{first.action} of {shorten(keys)} fits nowhere: {fits}; then none of {len(stuck)} can come next"
        )
    last = [operation.call for operation in result.last]
    lines = ("last that fit:", *show(*last), "none fits next:", *show(*stuck))
    promise = DECIDED if result.found is None else LINEAR
    return Violation("linear", promise, what, first.ended_at, first.process, lines)


def _name(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell[0] or 'some value'} @ {cell[1] or 'some revision'}"


def partition(operations: Sequence[Operation]) -> list[set[str]]:
    """Divide the keys into sets that no operation joins."""
    leaders: dict[str, str] = {}

    def leader(key: str) -> str:
        while leaders.setdefault(key, key) != key:
            key = leaders[key]
        return key

    for operation in operations:
        for key in operation.keys:
            leaders[leader(key)] = leader(operation.keys[0])
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for key in leaders:
        parts[leader(key)].add(key)
    return list(parts.values())


def operations_on(keys: set[str], operations: Sequence[Operation]) -> list[Operation]:
    """Return the operations on any of these keys."""
    return [operation for operation in operations if not keys.isdisjoint(operation.keys)]


def _observable(unknown: Sequence[Operation], answered: Sequence[Operation]) -> list[Operation]:
    """Return the calls of unknown outcome that some answer may show.

    The others can be left out: no call read the key between such a write and the next of its key, so an order
    with it is an order without it. Values that were never read need not be told apart.
    """
    seen: set[str] = set()
    looked_at: dict[tuple[str, bool], float] = {}  # (key, absent) → time of a read that names no value
    for operation in (*answered, *unknown):
        for key, cell in operation.demands:
            if isinstance(cell, tuple) and cell[0] is not None:
                seen.add(cell[0])
            elif cell != ANYTHING:
                look = (key, cell == ABSENT)
                looked_at[look] = max(looked_at.get(look, float("-inf")), operation.call.ended_at)
    return [
        dataclasses.replace(
            operation, effects=tuple((key, _without_unseen(cell, seen)) for key, cell in operation.effects)
        )
        for operation in unknown
        if any(
            (isinstance(cell, tuple) and cell[0] in seen)
            or looked_at.get((key, cell == ABSENT), float("-inf")) >= operation.call.began_at
            for key, cell in operation.effects
        )
    ]


def _without_unseen(cell: Cell, seen: set[str]) -> Cell:
    return cell if isinstance(cell, str) or cell[0] in seen else ("a value that was never read", cell[1])


# ---------------------------------------------------------------------- checks without a search


def _check_written(calls: Sequence[Call]) -> list[Violation]:
    """Check that each value that was read had begun to be written before."""
    begun: dict[tuple[str, str], float] = {}
    for call in calls:
        if call.action in WRITES and call.action != "delete":
            arguments = call.arguments
            puts = (
                arguments["puts"] if call.action == "transact" else [(arguments["key"], arguments["value"])]
            )
            for key, value in puts:
                begun[key, value] = min(begun.get((key, value), call.began_at), call.began_at)
    violations = []
    for call in calls:
        if call.action == "get" and call.outcome == "ok" and call.answer["value"] is not None:
            key, value = call.arguments["key"], call.answer["value"]
            if begun.get((key, value), float("inf")) > call.ended_at:
                what = f"read {value} from {key}, which no call had begun to write"
                violations.append(Violation("linear", WRITTEN, what, call.ended_at, call.process, show(call)))
    return violations


def _check_refusals(operations: Sequence[Operation]) -> list[Violation]:
    """Check that no comparison was refused by the very revision that it expected."""
    violations = []
    for call in (operation.call for operation in operations if operation.call.outcome == "refused"):
        arguments, answer = call.arguments, call.answer
        if call.action == "compare_and_put":
            wanted = [arguments["expected"]]
        elif call.action == "transact":
            wanted = [revision for key, revision in arguments["compares"] if key == answer["key"]]
        else:
            continue
        if all(revision == answer["found"] for revision in wanted):
            what = f"{call.action} was refused, though it found what it expected: {answer['found']}"
            violations.append(Violation("linear", LINEAR, what, call.ended_at, call.process, show(call)))
    return violations


def _check_rising(operations: Sequence[Operation]) -> list[Violation]:
    """Check that revisions order writes as time does. All revisions here belong to one history, so they can
    be compared."""
    writes = [operation for operation in operations if operation.revision is not None]
    by_end = sorted(writes, key=lambda operation: operation.call.ended_at)
    violations: list[Violation] = []
    highest: Operation | None = None
    ended = 0
    for operation in sorted(writes, key=lambda operation: operation.call.began_at):
        while by_end[ended].call.ended_at < operation.call.began_at:
            if highest is None or _revision(by_end[ended]) > _revision(highest):
                highest = by_end[ended]
            ended += 1
        if highest is not None and _revision(operation) <= _revision(highest):
            what = (
                f"a write got revision {operation.revision}, after one that had ended got {highest.revision}"
            )
            call = operation.call
            lines = show(highest.call, call)
            violations.append(Violation("linear", RISING, what, call.ended_at, call.process, lines))
    return violations


def _revision(operation: Operation) -> tuple[int, int]:
    assert operation.revision is not None
    return order(operation.revision)  # type: ignore[arg-type]


def _report_conflict(one: Operation, other: Operation) -> Violation:
    later = max(one.call, other.call, key=lambda call: call.ended_at)
    what = f"two answers about {shorten(one.keys)} name one write or revision, and differ in the other"
    return Violation("linear", ONE_REVISION, what, later.ended_at, later.process, show(one.call, other.call))
