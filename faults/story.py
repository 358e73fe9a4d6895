"""Histories that are not read from files: written by hand, or recorded within one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from faults.history import Call, History, Note, Outcome


@dataclass(slots=True)
class OpenCall:
    """A call under way. End it once, or leave it: then its outcome is unknown."""

    _story: Story
    _index: int

    def ok(self, answer: Any = None) -> None:
        """End it as done, with this answer."""
        self._end("ok", answer)

    def refused(self, answer: Any = None) -> None:
        """End it as certainly not done, with this answer."""
        self._end("refused", answer)

    def fails(self, answer: Any = None) -> None:
        """Note that its caller was told of an error: the outcome stays unknown."""
        self._end("unknown", answer)

    def _end(self, outcome: Outcome, answer: Any) -> None:
        calls = self._story.calls
        begun = calls[self._index]
        assert begun.outcome == "unknown", f"{begun} has ended"
        calls[self._index] = Call(
            begun.process,
            begun.number,
            begun.action,
            begun.arguments,
            begun.began_at,
            float("inf") if outcome == "unknown" else self._story.now(),
            outcome,
            answer,
        )


class Story:
    """A history that grows by calls of its methods. Without a clock, each event comes 1 s after the one
    before."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        ticks = itertools.count(1)
        self.now = clock or (lambda: float(next(ticks)))
        self.calls: list[Call] = []
        self.notes: list[Note] = []

    @property
    def history(self) -> History:
        """The history so far."""
        calls = sorted(self.calls, key=lambda call: call.began_at)
        return History(calls, sorted(self.notes, key=lambda note: note.at))

    def begin(self, process: str, action: str, /, **arguments: Any) -> OpenCall:
        """Begin a call."""
        number, infinity = len(self.calls), float("inf")
        self.calls.append(Call(process, number, action, arguments, self.now(), infinity, "unknown"))
        return OpenCall(self, number)

    def call(
        self, process: str, action: str, answer: Any = None, /, *, refused: bool = False, **arguments: Any
    ) -> None:
        """Begin and end a call, with nothing in between."""
        begun = self.begin(process, action, **arguments)
        if refused:
            begun.refused(answer)
        else:
            begun.ok(answer)

    def note(self, process: str, kind: str, /, **fields: Any) -> None:
        """Add a note."""
        self.notes.append(Note(process, self.now(), kind, fields))
