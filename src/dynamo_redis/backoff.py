"""Pauses between attempts, random, so that many processes do not retry at the same moment."""

from __future__ import annotations

import random


class Backoff:
    """Waits between attempts: full jitter, doubling from `first_s` to `cap_s`."""

    def __init__(
        self, first_s: float = 0.05, cap_s: float = 2.0, *, rng: random.Random | None = None
    ) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._uniform = (rng or random).uniform
        self._attempts = 0

    def next_s(self) -> float:
        """Return the next wait in seconds; the one after it may be twice as long."""
        ceiling = min(self._cap_s, self._first_s * 2 ** min(self._attempts, 16))
        self._attempts += 1
        return self._uniform(0, ceiling)

    def reset(self) -> None:
        """Start from `first_s` again, after an attempt that succeeded."""
        self._attempts = 0
