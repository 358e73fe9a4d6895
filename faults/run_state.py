"""The state of a run according to the histories so far, read while they are written: do all processes agree?

The runner uses it to decide that a run may end, and to measure the recovery. It does not judge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dynamo_redis.names import BARRIERS, PORTS

_NEVER_FAIL: Final = frozenset({"release", "barrier_leave"})
"""Calls that succeed without an answer from Redis: they do not show that it serves."""

_GIVEN_UP: Final = (PORTS, BARRIERS)
"""Keys that a process has only until it gives them up."""


@dataclass(slots=True)
class _File:
    """A history that is read piece by piece."""

    read_bytes: int = 0
    rest: bytes = b""
    pending: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class _Watch:
    prefix: str
    state: dict[str, str]


class RunState:
    """The state of all load processes, as their histories show it. `read` brings it up to date."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, _File] = {}
        self._watches: dict[str, dict[str, _Watch]] = {}
        self._closed: dict[str, _Watch] = {}
        self._keys: dict[str, set[str]] = {}
        self._served_at: dict[str, float] = {}
        self.leases: dict[str, str] = {}
        self.call_count = 0
        self.unknown_count = 0
        self.batch_count = 0
        self.resync_count = 0
        self.lease_loss_count = 0

    def read(self) -> None:
        """Read the new lines of all histories."""
        for path in self._directory.glob("*.jsonl"):
            if path.stem not in ("runner", "observer"):
                self._read_file(path, self._files.setdefault(path.stem, _File()))

    def _read_file(self, path: Path, file: _File) -> None:
        with path.open("rb") as stream:
            stream.seek(file.read_bytes)
            content = stream.read()
        file.read_bytes += len(content)
        *lines, file.rest = (file.rest + content).split(b"\n")
        for text in lines:
            line = json.loads(text)
            if "note" in line:
                self._apply_note(path.stem, line)
            elif "begin" in line:
                self.call_count += 1
                self.unknown_count += 1
                self._begin(path.stem, line)
                file.pending[line["call"]] = line
            else:
                begin = file.pending.pop(line["call"])
                if line["end"] != "unknown":
                    self.unknown_count -= 1
                self._end(path.stem, begin, line)

    def served_at(self, process: str) -> float:
        """Return the beginning of the process's last call that was answered; infinity if it never made a
        call."""
        return self._served_at.get(process, float("inf"))

    # ------------------------------------------------------------------ calls

    def _begin(self, process: str, line: dict[str, Any]) -> None:
        self._served_at.setdefault(process, float("-inf"))
        if line["begin"] == "unregister":
            self._keys.setdefault(process, set()).discard(line["arguments"]["key"])
        elif line["begin"] == "release":
            self._keys.setdefault(process, set()).difference_update(line["arguments"]["keys"])

    def _end(self, process: str, begin: dict[str, Any], end: dict[str, Any]) -> None:
        if end["end"] != "unknown" and begin["begin"] not in _NEVER_FAIL:
            self._served_at[process] = begin["at"]
        if begin["begin"] == "register" and end["end"] == "ok":
            self._keys.setdefault(process, set()).add(begin["arguments"]["key"])
        elif begin["begin"] == "reserve" and end["end"] == "ok":
            self._keys.setdefault(process, set()).update(end["answer"]["keys"])

    # ------------------------------------------------------------------ watches

    def _apply_note(self, process: str, line: dict[str, Any]) -> None:
        watches = self._watches.setdefault(process, {})
        match line["note"]:
            case "started":
                if line["lease"]:
                    self.leases[process] = line["lease"]
            case "lease_lost":
                self.lease_loss_count += 1
            case "lost":
                self._keys.setdefault(process, set()).discard(line["key"])
            case "watching":
                before = self._closed.pop(line["resumes"], None) if line["resumes"] else None
                watches[line["watch"]] = _Watch(line["prefix"], dict(before.state) if before else {})
            case "unwatched":
                self._closed[line["watch"]] = watches.pop(line["watch"])
            case "watch":
                self.batch_count += 1
                self.resync_count += line["resync"] is not None
                self._apply(watches[line["watch"]].state, line["events"])

    @staticmethod
    def _apply(state: dict[str, str], events: Iterable[list[str]]) -> None:
        for kind, key, value, _ in events:
            if kind == "put":
                state[key] = value
            else:
                state.pop(key, None)

    # ------------------------------------------------------------------ agreement

    def disagreement(self, records: dict[str, list[str | None]], alive: set[str]) -> str | None:
        """Return the reason why the run is not quiet yet. Return None if every watch of the processes alive
        shows these records, each worker alive has its keys under its lease, and there are no other keys."""
        now = {key: record[0] for key, record in records.items()}
        for process in sorted(alive & self._watches.keys()):
            for name, watch in self._watches[process].items():
                wanted = {key: value for key, value in now.items() if key.startswith(watch.prefix)}
                if watch.state != wanted:
                    return f"watch {name} differs in {_some(watch.state.items() ^ wanted.items())}"
        leases = {self.leases[process]: process for process in alive & self.leases.keys()}
        for key, (_, lease, _) in records.items():
            if lease is not None and lease not in leases:
                return f"{key} stands under the lease {lease} of a dead process"
        for lease, process in leases.items():
            held = {key for key, record in records.items() if record[1] == lease}
            if self._keys.get(process, set()) - held:
                return f"{process} lacks {_some(self._keys[process] - held)}"
            given_up = {key for key in held - self._keys.get(process, set()) if key.startswith(_GIVEN_UP)}
            if given_up:
                return f"{process} has given up {_some(given_up)}, which stands"
        return None


def _some(things: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, things))[:3])
