"""The times at which a run's faults may have destroyed acknowledged data.

A `loses` note opens a window, which ends when its fault, the last one named before it, is `healed`; without
that it is a moment. Data that was acknowledged before it may be gone afterwards: no asynchronous replica, and
no file synced once a second, promises otherwise (`docs/guarantees.md`). So promises about values hold within
each stretch between two windows, and the values at its beginning are unknown.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from faults.history import History

OF_VALUES: Final = frozenset({"data", "tail"})
"""Losses that may take acknowledged writes. A trimmed log ("log") takes none."""


class Losses:
    """The windows of a history in which acknowledged writes may have been lost, ordered."""

    def __init__(self, history: History, kinds: Collection[str] = OF_VALUES) -> None:
        self.windows: list[tuple[float, float]] = []
        fault: str | None = None
        opened: dict[str | None, float] = {}
        for note in history.of("fault", "loses", "healed"):
            if note.kind == "fault":
                fault = note.fields["name"]
            elif note.kind == "loses" and note.fields["what"] in kinds:
                opened.setdefault(fault, note.at)
            elif note.kind == "healed" and note.fields.get("name") in opened:
                self.windows.append((opened.pop(note.fields["name"]), note.at))
        self.windows = _merged([*self.windows, *((at, at) for at in opened.values())])

    def between(self, earlier: float, later: float) -> bool:
        """Return whether acknowledged writes may have been lost in this stretch of time."""
        return any(begin <= later and end >= earlier for begin, end in self.windows)

    def stretches(self) -> list[tuple[float, float]]:
        """Return the stretches between the windows, ordered; one more than there are windows."""
        begins = [float("-inf"), *(end for _, end in self.windows)]
        ends = [*(begin for begin, _ in self.windows), float("inf")]
        return list(zip(begins, ends, strict=True))


def _merged(windows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the same stretches of time, ordered, without overlaps."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(windows):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
