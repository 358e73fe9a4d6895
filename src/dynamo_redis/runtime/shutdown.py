"""The deadline of a shutdown, for requests under way and for the closing steps after them."""

from __future__ import annotations

import time


class ShutdownDeadline:
    """The deadline of one shutdown, shared by all its parts. It runs from the first `begin`.

    Requests under way may take what is left of `total_s` minus `closing_s`. `closing_s` is kept for the steps
    after them: the goodbye to callers, the end of the lease, the connections.
    """

    __slots__ = ("_ends_at", "closing_s", "total_s")

    def __init__(self, total_s: float, closing_s: float) -> None:
        self.total_s = total_s
        self.closing_s = closing_s
        self._ends_at: float | None = None

    def begin(self) -> None:
        """Start the time of the shutdown, unless it runs already."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self.total_s

    @property
    def left_s(self) -> float:
        """Seconds that the shutdown may still take, at least 0; `total_s` before it has begun."""
        return self.total_s if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    @property
    def requests_left_s(self) -> float:
        """Seconds that requests under way may still take."""
        return max(0.0, self.left_s - self.closing_s)
