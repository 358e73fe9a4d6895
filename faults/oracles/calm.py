"""Stretches of calm in a run, after which all that the faults upset must be right again."""

from __future__ import annotations

from typing import Final

from faults.history import History

SETTLED_S: Final = 6.0
"""Seconds without a fault after which every process is connected again, has been told of its losses, and the
keys of the dead are gone: a TTL, the longest wait between two attempts, a repair."""


class Calm:
    """The troubles of a run: its faults, and for each process the times at which it was stopped."""

    def __init__(self, history: History) -> None:
        self._faults: list[tuple[float, float]] = []
        self._stops: dict[str, list[tuple[float, float]]] = {}
        begun: dict[str, float] = {}
        for note in history.of("fault", "healed"):
            if note.kind == "fault":
                begun.setdefault(note.fields["name"], note.at)
            elif note.fields["name"] in begun:
                self._faults.append((begun.pop(note.fields["name"]), note.at))
        self._faults += ((at, float("inf")) for at in begun.values())
        stopped: dict[str, float] = {}
        for note in history.of("frozen", "thawed"):
            process = note.fields["process"]
            if note.kind == "frozen":
                stopped[process] = note.at
            elif process in stopped:
                self._stops.setdefault(process, []).append((stopped.pop(process), note.at))
        for process, at in stopped.items():
            self._stops.setdefault(process, []).append((at, float("inf")))

    def settled_after(self, at: float, *processes: str) -> float:
        """Return the end of the first `SETTLED_S` without trouble for these processes from `at` on."""
        for begin, end in sorted([*self._faults, *self._stopped(processes)]):
            if begin < at + SETTLED_S and end > at:
                at = end
        return at + SETTLED_S

    def troubled(self, begin: float, end: float, *processes: str) -> bool:
        """Return whether there was trouble for these processes within a stretch of time."""
        return any(
            trouble[0] <= end and trouble[1] >= begin
            for trouble in (*self._faults, *self._stopped(processes))
        )

    def stopped_s(self, process: str, begin: float, end: float) -> float:
        """Return the seconds for which a process was stopped within a stretch of time."""
        return sum(
            max(0.0, min(end, thawed) - max(begin, frozen)) for frozen, thawed in self._stopped((process,))
        )

    def _stopped(self, processes: tuple[str, ...]) -> list[tuple[float, float]]:
        return [stop for process in processes for stop in self._stops.get(process, ())]
