"""Check that a fault does not stop the actions that it leaves alone: reads while writes are refused, all on a
slow link.

A `fault` note names in `serves` the actions that must be served while it lasts, or `*` for all. `back_s` is
the time after its end within which all must be served, until the next fault comes. A `joining` note names a
process that was started meanwhile, and the note that shows that it is served.
"""

from __future__ import annotations

from typing import Final

from faults.history import Call, History, Note
from faults.oracles.violation import Violation, show

EVERYTHING: Final = ("*",)

SERVED: Final = "actions that a fault does not affect are served while it lasts"
BACK: Final = "all actions are served again soon after a fault"
JOINS: Final = "a process that is started while a fault lasts is served before that is over"


def check(history: History) -> list[Violation]:
    """Check all faults of a run that leave some action alone."""
    stopped = {note.fields["process"] for note in history.of("frozen", "hung")}
    failed = [call for call in history.calls if _failed(call) and call.process not in stopped]
    faults = list(history.of("fault"))
    violations: list[Violation] = []
    for fault, following in zip(faults, [*faults, None][1:], strict=True):
        ended_at = _healed_at(history, fault.fields["name"], fault.at)
        serves = fault.fields.get("serves", ())
        violations += (
            _unserved(SERVED, "during", call, fault)
            for call in failed
            if fault.at < call.began_at < ended_at and (call.action in serves or serves == list(EVERYTHING))
        )
        if (back_s := fault.fields.get("back_s")) is not None:
            until = float("inf") if following is None else following.at
            violations += (
                _unserved(BACK, f"more than {back_s:g} s after", call, fault)
                for call in failed
                if ended_at + back_s < call.began_at < until - back_s
            )
    return violations + [found for note in history.of("joining") for found in _check_joining(history, note)]


def _healed_at(history: History, name: str, at: float) -> float:
    return next(
        (note.at for note in history.of("healed") if note.fields["name"] == name and note.at >= at),
        float("inf"),
    )


def _failed(call: Call) -> bool:
    """Return whether its caller was told of an error. A caller that was killed or is still waiting was told
    nothing."""
    return call.outcome == "unknown" and call.answer is not None


def _unserved(promise: str, when: str, call: Call, fault: Note) -> Violation:
    what = f"{call.action} failed {when} {fault.fields['name']!r}: {call.answer.get('error')}"
    return Violation("served", promise, what, call.began_at, call.process, show(fault, call))


def _check_joining(history: History, joining: Note) -> list[Violation]:
    process, sign, fault = (joining.fields[name] for name in ("process", "sign", "fault"))
    healed_at = _healed_at(history, fault, joining.at)
    if any(note.process == process and note.at < healed_at for note in history.of(sign)):
        return []
    what = f"{process} was not served while {fault!r} lasted"
    return [Violation("served", JOINS, what, joining.at, process, show(joining))]
