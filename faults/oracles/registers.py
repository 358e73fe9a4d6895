"""The registry's keys as registers: the demands of each call on them, and its effects.

A register is absent, or holds a value under a revision. A *cell* is the knowledge about a register: a pair
whose parts may be unknown (None), `ABSENT`, or `ANYTHING`. A call's demand is a cell too. Demanding it of a
register joins the two: then an unknown part becomes known, or they contradict each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from faults.history import Call

Cell = tuple[str | None, str | None] | Literal["absent", "anything"]
"""(value, revision), each None where it is unknown; or a word."""

ABSENT: Final = "absent"
ANYTHING: Final = "anything"
PRESENT: Final = (None, None)

WRITES: Final = frozenset({"put", "create", "compare_and_put", "delete", "transact"})
ACTIONS: Final = WRITES | {"get"}


@dataclass(frozen=True, slots=True)
class Operation:
    """A call as a step of registers: all `demands` must hold, and `effects` hold afterwards. `revision` is
    the answered one, of a write."""

    call: Call
    demands: tuple[tuple[str, Cell], ...]
    effects: tuple[tuple[str, Cell], ...]
    revision: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the operation."""
        return tuple(dict.fromkeys(key for key, _ in (*self.demands, *self.effects)))


def join(known: Cell, demanded: Cell) -> Cell | None:
    """Return the knowledge when both hold; None if they contradict each other."""
    if known in (ANYTHING, demanded):
        return demanded
    if demanded == ANYTHING:
        return known
    if isinstance(known, str) or isinstance(demanded, str):
        return None
    value, revision = known
    other_value, other_revision = demanded
    if value is not None and other_value not in (None, value):
        return None
    if revision is not None and other_revision not in (None, revision):
        return None
    return (other_value if value is None else value, other_revision if revision is None else revision)


def operation_of(call: Call) -> Operation:
    """Return the operation of an answered call, by its answer; of one of unknown outcome, as if it
    succeeded."""
    if call.outcome == "refused":
        return Operation(call, _refusal(call), ())
    answer = call.answer if call.outcome == "ok" and isinstance(call.answer, Mapping) else {}
    revision = answer.get("revision")
    arguments = call.arguments
    match call.action:
        case "get":
            seen: Cell = ABSENT if answer["value"] is None else (answer["value"], revision)
            return Operation(call, ((arguments["key"], seen),), ())
        case "put":
            return Operation(call, (), ((arguments["key"], (arguments["value"], revision)),), revision)
        case "create":
            return _conditional(call, [(arguments["key"], None)], revision)
        case "compare_and_put":
            return _conditional(call, [(arguments["key"], arguments["expected"])], revision)
        case "delete":
            return Operation(
                call, ((arguments["key"], _found(answer.get("deleted"))),), ((arguments["key"], ABSENT),)
            )
        case _:
            return _transaction(call, revision)


def _found(was_there: bool | None) -> Cell:
    if was_there is None:
        return ANYTHING
    return PRESENT if was_there else ABSENT


def _conditional(call: Call, compares: Iterable[Sequence[Any]], revision: str | None) -> Operation:
    effect = (call.arguments["key"], (call.arguments["value"], revision))
    return Operation(call, tuple((key, at(wanted)) for key, wanted in compares), (effect,), revision)


def _transaction(call: Call, revision: str | None) -> Operation:
    """Return the operation of a transaction. Its answer is the revision of its last change: of its last put,
    if it deletes nothing."""
    puts, deletes = call.arguments["puts"], call.arguments["deletes"]
    effects: dict[str, Cell] = {key: (value, None) for key, value in puts}
    if puts and not deletes:
        key, value = puts[-1]
        effects[key] = (value, revision)
    effects |= dict.fromkeys(deletes, ABSENT)
    demands = tuple((key, at(wanted)) for key, wanted in call.arguments["compares"])
    return Operation(call, demands, tuple(effects.items()), revision)


def _refusal(call: Call) -> tuple[tuple[str, Cell], ...]:
    arguments, answer = call.arguments, call.answer
    match call.action:
        case "create":
            return ((arguments["key"], PRESENT),)
        case "compare_and_put":
            return ((arguments["key"], at(answer["found"])),)
        case "transact":
            # Comparisons are made in order, so those before the one that failed held.
            held = []
            for key, wanted in arguments["compares"]:
                if key == answer["key"] and wanted != answer["found"]:
                    break
                held.append((key, at(wanted)))
            return (*held, (answer["key"], at(answer["found"])))
        case _:
            return ()


def at(revision: str | None) -> Cell:
    """Return the demand of a comparison with a revision; None is "absent"."""
    return ABSENT if revision is None else (None, revision)


class Attribution:
    """The value under each revision, as far as answers tell. `conflicts` are the answers that contradict each
    other. Each value is written by one call; other values are left out."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        effects = [cell for operation in operations for _, cell in operation.effects]
        written = Counter(cell[0] for cell in effects if isinstance(cell, tuple))
        self.conflicts: list[tuple[Operation, Operation]] = []
        self._revisions: dict[str, tuple[str, Operation]] = {}
        self._values: dict[tuple[str, str], tuple[str, Operation]] = {}
        for operation in operations:
            for key, cell in (*operation.demands, *operation.effects):
                value, revision = cell if isinstance(cell, tuple) else (None, None)
                if value is not None and revision is not None and written[value] <= 1:
                    self._attribute(key, value, revision, operation)

    def _attribute(self, key: str, value: str, revision: str, operation: Operation) -> None:
        known, by = self._revisions.setdefault(value, (revision, operation))
        if known != revision:
            self.conflicts.append((by, operation))
        other, by = self._values.setdefault((key, revision), (value, operation))
        if other != value:
            self.conflicts.append((by, operation))

    def complete(self, operation: Operation) -> Operation:
        """Return the same operation with the known parts filled in."""
        demands = tuple((key, self._complete(key, cell)) for key, cell in operation.demands)
        effects = tuple((key, self._complete(key, cell)) for key, cell in operation.effects)
        return Operation(operation.call, demands, effects, operation.revision)

    def _complete(self, key: str, cell: Cell) -> Cell:
        if not isinstance(cell, tuple):
            return cell
        value, revision = cell
        if value is not None and revision is None and value in self._revisions:
            return (value, self._revisions[value][0])
        if value is None and revision is not None and (key, revision) in self._values:
            return (self._values[key, revision][0], revision)
        return cell
