"""The fates of the processes of a run, from their own notes and the runner's."""

from __future__ import annotations

from collections import defaultdict
from typing import Final, Literal

from faults.history import History

Fate = Literal["live", "dead", "stopped"]

_FATES: Final[dict[str, Fate]] = {
    "started": "live",
    "alive": "live",
    "thawed": "live",
    "killed": "dead",
    "frozen": "stopped",
    "hung": "stopped",
}


class Fates:
    """Each process's last known fate, and its leases. A note names the process that it is about; otherwise it
    is about its writer.

    `ended_at` is the time at which the final state was read: later notes are of the run's own end.
    """

    def __init__(self, history: History) -> None:
        self._fates: dict[str, Fate] = {}
        self._since: dict[str, float] = {}
        self._present: set[str] = set()
        self.leases: defaultdict[str, set[str]] = defaultdict(set)
        for note in history.of(*_FATES):
            process = note.fields.get("process", note.process)
            self._fates[process] = _FATES[note.kind]
            self._since[process] = note.at
            if note.kind == "alive":
                self._present.add(process)
            if note.fields.get("lease"):
                self.leases[process].add(note.fields["lease"])
        self.ended_at = min((note.at for note in history.of("state")), default=float("inf"))

    def of(self, process: str) -> Fate:
        """Return its fate at the end. A process without a note lives."""
        return self._fates.get(process, "live")

    def since(self, process: str) -> float:
        """Return the time at which its fate was noted."""
        return self._since.get(process, float("-inf"))

    def vanished(self) -> list[str]:
        """Return the processes that ended by themselves: they were not killed, and were not there at the end.

        This is known only of runs that note the present processes at the end.
        """
        if not self._present:
            return []
        lived = {process for process, fate in self._fates.items() if fate == "live"}
        return sorted(lived - self._present)

    def is_present(self, process: str) -> bool:
        """Return whether it works at the end, as far as notes tell."""
        return self.of(process) == "live" and (not self._present or process in self._present)
