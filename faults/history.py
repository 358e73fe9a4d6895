"""The history of a run: a line of JSON for each event, written by each process to a file of its own.

There are two kinds of line. A *call* has two lines: one before the request is sent, one when its outcome is
known. A process that is killed in between leaves only the first, and the outcome is unknown. A *note* is one
line: an observation of a watch, an entry of the log, an action of the runner.

`at` is CLOCK_MONOTONIC in seconds, which all processes of one machine share, so lines of different processes
can be ordered. A line is written with one unbuffered `write`, so a killed process leaves only whole lines.
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
"""Done; certainly not done (the answer gives the reason); not known."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `ended_at` is infinity while the outcome is unknown: it may take effect later.

    `answer` is the returned value, or the message of a refusal.
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
    """An observation or action of a process at one moment."""

    process: str
    at: float
    kind: str
    fields: Mapping[str, Any]


@dataclass(slots=True)
class History:
    """All events of a run, each list ordered by time (calls by their beginning)."""

    calls: list[Call] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the files of a run's processes."""
        history = cls()
        for path in sorted(directory.glob("*.jsonl")):
            history._read_file(path.stem, path)
        history.calls.sort(key=lambda call: call.began_at)
        history.notes.sort(key=lambda note: note.at)
        return history

    def of(self, *kinds: str) -> Iterator[Note]:
        """Yield the notes of some kinds."""
        return (note for note in self.notes if note.kind in kinds)

    def _read_file(self, process: str, path: Path) -> None:
        begins: dict[int, dict[str, Any]] = {}
        for text in path.read_text().splitlines():
            line = json.loads(text)
            at = line.pop("at")
            if "note" in line:
                self.notes.append(Note(process, at, line.pop("note"), line))
            elif "begin" in line:
                begins[line["call"]] = line | {"at": at}
            else:
                self._end(process, begins.pop(line["call"]), at, line["end"], line["answer"])
        for line in begins.values():
            self._end(process, line, float("inf"), "unknown", None)

    def _end(self, process: str, begin: dict[str, Any], at: float, outcome: Outcome, answer: Any) -> None:
        ended_at = float("inf") if outcome == "unknown" else at
        self.calls.append(
            Call(
                process,
                begin["call"],
                begin["begin"],
                begin["arguments"],
                begin["at"],
                ended_at,
                outcome,
                answer,
            )
        )


def recorded_value(value: bytes) -> str:
    """Return a value in the form that histories hold, whatever it is: up to a `|`, behind which a large value
    is filled up."""
    return value.partition(b"|")[0].decode(errors="backslashreplace")


class Recorder:
    """Writes one process's file, named after the process."""

    def __init__(self, directory: Path, process: str) -> None:
        self._file = os.open(directory / f"{process}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._calls = 0

    def begin(self, action: str, /, **arguments: Any) -> int:
        """Write that a request is about to be sent, and return its number for `end`."""
        self._calls += 1
        self._write({"call": self._calls, "begin": action, "arguments": arguments})
        return self._calls

    def end(self, call: int, outcome: Outcome, answer: Any = None) -> None:
        """Write the outcome of a call. An unknown outcome need not be written."""
        self._write({"call": call, "end": outcome, "answer": answer})

    def note(self, kind: str, /, **fields: Any) -> None:
        """Write an observation or action of this moment."""
        self._write({"note": kind, **fields})

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps({"at": time.monotonic(), **line}).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
