"""What happened in a run: one line of JSON for each event, written by each process to a file of its own.

Two kinds of line. A *call* has two: one before the request is sent, one when its outcome is known; a process
that is killed in between leaves the first alone, and the outcome is unknown. A *note* stands for itself: what
a watch showed, what the log held, what the runner did.

`at` is CLOCK_MONOTONIC in seconds, which all processes of one machine share, so that lines of different
processes can be ordered. A line is written with one unbuffered `write`, so that what a killed process has
written is whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Outcome = Literal["ok", "refused", "unknown"]
"""Done; certainly not done (the answer says why); nobody knows."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `ended_at` is infinity while the outcome is unknown: it may yet take effect.

    `answer` is what it returned, or for a refusal what that said.
    """

    process: str
    number: int
    action: str
    arguments: Mapping[str, Any]
    began_at: float
    ended_at: float
    outcome: Outcome
    answer: Any = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a process saw or did at one moment."""

    process: str
    at: float
    kind: str
    fields: Mapping[str, Any]


@dataclass(slots=True)
class History:
    """All of a run, each list ordered by time (calls by when they began)."""

    calls: list[Call] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Put the files of a run's processes together."""
        history = cls()
        for path in sorted(directory.glob("*.jsonl")):
            history._take(path.stem, path)
        history.calls.sort(key=lambda call: call.began_at)
        history.notes.sort(key=lambda note: note.at)
        return history

    def of(self, *kinds: str) -> Iterator[Note]:
        """The notes of some kinds."""
        return (note for note in self.notes if note.kind in kinds)

    def _take(self, process: str, path: Path) -> None:
        begun: dict[int, dict[str, Any]] = {}
        for text in path.read_text().splitlines():
            line = json.loads(text)
            at = line.pop("at")
            if "note" in line:
                self.notes.append(Note(process, at, line.pop("note"), line))
            elif "begin" in line:
                begun[line["call"]] = line | {"at": at}
            else:
                self._end(process, begun.pop(line["call"]), at, line["end"], line["answer"])
        for line in begun.values():
            self._end(process, line, float("inf"), "unknown", None)

    def _end(self, process: str, begun: dict[str, Any], at: float, outcome: Outcome, answer: Any) -> None:
        ended_at = float("inf") if outcome == "unknown" else at
        self.calls.append(
            Call(
                process,
                begun["call"],
                begun["begin"],
                begun["arguments"],
                begun["at"],
                ended_at,
                outcome,
                answer,
            )
        )


def shown(value: bytes) -> str:
    """A value as histories hold it: up to a `|`, behind which a large one is filled up; whatever it is."""
    return value.partition(b"|")[0].decode(errors="backslashreplace")


class Recorder:
    """Writes one process's file, named after the process."""

    def __init__(self, directory: Path, process: str) -> None:
        self._file = os.open(directory / f"{process}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._calls = 0

    def begin(self, action: str, /, **arguments: Any) -> int:
        """A request is about to be sent; answers its number, for `end`."""
        self._calls += 1
        self._write({"call": self._calls, "begin": action, "arguments": arguments})
        return self._calls

    def end(self, call: int, outcome: Outcome, answer: Any = None) -> None:
        """Its outcome. Of an unknown one nothing need be written."""
        self._write({"call": call, "end": outcome, "answer": answer})

    def note(self, kind: str, /, **fields: Any) -> None:
        """Something seen or done now."""
        self._write({"note": kind, **fields})

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps({"at": time.monotonic(), **line}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
