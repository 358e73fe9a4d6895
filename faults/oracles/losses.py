"""When a run's faults may have destroyed what had been acknowledged.

A `loses` note opens a window, the next `healed` note ends it; without one it is a moment. Acknowledged writes
of before may be gone afterwards, which no asynchronous replica and no log flushed once a second promises
otherwise (`docs/guarantees.md`); so promises about values hold within each stretch between two windows, and
nothing is assumed about what a stretch begins with.
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
        opened: float | None = None
        for note in history.of("loses", "healed"):
            if note.kind == "loses" and note.fields["what"] in kinds:
                opened = note.at if opened is None else opened
            elif note.kind == "healed" and opened is not None:
                self.windows.append((opened, note.at))
                opened = None
        if opened is not None:
            self.windows.append((opened, opened))

    def between(self, earlier: float, later: float) -> bool:
        """Whether something may have been lost in this stretch of time."""
        return any(begin <= later and end >= earlier for begin, end in self.windows)

    def stretches(self) -> list[tuple[float, float]]:
        """The stretches between the windows, ordered; one more than there are windows."""
        begins = [float("-inf"), *(end for _, end in self.windows)]
        ends = [*(begin for begin, _ in self.windows), float("inf")]
        return list(zip(begins, ends, strict=True))
