"""The one deadline of a shutdown: for requests under way, and for what follows them."""

from __future__ import annotations

import time


class ShutdownDeadline:
    """Begins when a shutdown is asked for, and passes once, however many wait for it.

    The requests have what is left of `total_s` but for `closing_s`, which is kept for what follows them: the
    callers' farewell, the lease, the connections.
    """

    __slots__ = ("_ends_at", "closing_s", "total_s")

    def __init__(self, total_s: float, closing_s: float) -> None:
        self.total_s = total_s
        self.closing_s = closing_s
        self._ends_at: float | None = None

    def begin(self) -> None:
        """Begin the shutdown, unless it has begun."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self.total_s

    @property
    def left_s(self) -> float:
        """Seconds that the shutdown may still take, at least 0; all of them if it has not begun."""
        return self.total_s if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    @property
    def requests_left_s(self) -> float:
        """Seconds that requests under way may still take."""
        return max(0.0, self.left_s - self.closing_s)
