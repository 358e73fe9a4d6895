"""The report of an oracle about a broken promise, written for a reader without other context."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from faults.history import Call, Note

SHOWN_LINES_COUNT = 12
"""Lines of a history shown with a violation; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise.

    `what` is one sentence about the observation; `at` its time, on the history's clock; `process` the process
    that saw it; `promise` the promise that did not hold; `lines` the lines of the history that show it.
    """

    oracle: str
    promise: str
    what: str
    at: float
    process: str
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"[{self.oracle}] {self.at:.6f} {self.process}: {self.what}"

    def report(self) -> str:
        """Return the whole report, of several lines."""
        shown = self.lines[:SHOWN_LINES_COUNT]
        left = len(self.lines) - len(shown)
        return "\n".join(
            (
                str(self),
                f"    promised: {self.promise}",
                *(f"    {line}" for line in shown),
                *([f"    … and {left} lines more"] if left else []),
            )
        )


def show(*events: Call | Note) -> tuple[str, ...]:
    """Return calls and notes as lines, in order of time."""
    ordered = sorted(events, key=lambda event: event.began_at if isinstance(event, Call) else event.at)
    return tuple(_line(event) for event in ordered)


def shorten(names: Iterable[str], most: int = 5) -> str:
    """Return names for a sentence: the first few, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _line(event: Call | Note) -> str:
    if isinstance(event, Note):
        return f"{event.at:.6f}            {event.process}: {event.kind} {_short(event.fields)}"
    took = "never answered" if event.ended_at == float("inf") else f"+{event.ended_at - event.began_at:.6f}"
    answer = "" if event.outcome == "unknown" else f" {_short(event.answer)}"
    return (
        f"{event.began_at:.6f} {took} {event.process} #{event.number}:"
        f" {event.action} {_short(event.arguments)} → {event.outcome}{answer}"
    )


def _short(value: object, most: int = 300) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
