"""Time, behind an interface, so that tests can hold it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one to measure with, one to tell people."""

    def monotonic(self) -> float:
        """Seconds that never step, from an arbitrary origin. Every deadline uses these."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch; may step. For records and logs only."""
        ...


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


SYSTEM_CLOCK: Clock = SystemClock()
