"""What became of the processes of a run, by the notes that they and the runner wrote."""

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
    """Each process's last known fate, and its leases. A note names the process it is about, else its writer.

    `ended_at` is when the final state was read: what comes after it is the run's own end.
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
        """How it was at the end. One nobody wrote of lives."""
        return self._fates.get(process, "live")

    def since(self, process: str) -> float:
        """When that was noted."""
        return self._since.get(process, float("-inf"))

    def vanished(self) -> list[str]:
        """Processes that ended by themselves: nobody killed them, and they were not there at the end.

        Known only of runs that note at the end who is there.
        """
        if not self._present:
            return []
        lived = {process for process, fate in self._fates.items() if fate == "live"}
        return sorted(lived - self._present)

    def is_present(self, process: str) -> bool:
        """Whether it works at the end, as far as anybody noted."""
        return self.of(process) == "live" and (not self._present or process in self._present)
