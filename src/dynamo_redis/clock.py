"""Time behind an interface, so that tests can control it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one to measure time, one to show it."""

    def monotonic(self) -> float:
        """Return seconds from a clock that never steps, from an arbitrary origin. Every deadline uses
        these."""
        ...

    def wall(self) -> float:
        """Return seconds since the Unix epoch; the clock may step. For records and logs only."""
        ...


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


SYSTEM_CLOCK: Clock = SystemClock()
