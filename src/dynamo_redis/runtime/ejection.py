"""The rules for ejecting an instance that fails requests with errors of its own. Pure.

A worker can answer every probe while each request fails behind it: its engine answers 500, a key is refused,
the handler raises. Such a worker fails fast and looks idle, so every policy that looks at load sends it more
requests. Callers notice it first; each caller decides by its own requests.
"""

from __future__ import annotations

import random
from typing import Final

FAILURE_COUNT: Final = 5
"""The number of failures in a row, with no success between them, after which the instance is to blame."""

PAUSE_S: Final = (1.0, 60.0)
"""The first and the longest pause. Each pause is twice the one before, until a request succeeds."""


class FailureStreak:
    """The failures in a row of one instance, as this process has seen them."""

    __slots__ = ("_failure_count", "_pause_s")

    def __init__(self) -> None:
        self._failure_count = 0
        self._pause_s = PAUSE_S[0]

    def end(self) -> None:
        """End the streak: a request has succeeded."""
        if self._failure_count:
            self._failure_count = 0
            self._pause_s = PAUSE_S[0]

    def add(self) -> bool:
        """Count a failure; return whether there are enough to eject the instance."""
        self._failure_count += 1
        return self._failure_count >= FAILURE_COUNT

    def next_pause_s(self) -> float:
        """Return the next pause, with jitter. After it a single failure ejects the instance again."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, PAUSE_S[1])
        self._failure_count = FAILURE_COUNT - 1
        return pause_s * (0.75 + random.random() / 2)  # noqa: S311 - jitter


def may_eject(ejected_count: int, instance_count: int) -> bool:
    """Return whether one more instance may be ejected: never more than half of them, since a deployment whose
    requests all fail would have no workers left."""
    return 2 * (ejected_count + 1) <= instance_count
