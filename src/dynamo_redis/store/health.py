"""Whether Redis answers, and the log lines that say so: one a change, none while nothing changes."""

from __future__ import annotations

import logging
import time
from typing import Final

logger = logging.getLogger(__name__)

FLAP_S: Final = 5.0
"""A server that comes and goes is mentioned once in so many seconds."""


class Health:
    """The last exchange's outcome, shared by everything of a process that talks to one server."""

    def __init__(self, address: str) -> None:
        self.connected = False
        self._address = address
        self._away_since: float | None = None
        self._announced = False
        self._last_line_at = float("-inf")

    def succeeded(self) -> None:
        """The server answered."""
        self.connected = True
        if self._away_since is not None:
            away_s = time.monotonic() - self._away_since
            self._away_since = None
            if self._announced:
                logger.info("Redis at %s is back after %.1f s", self._address, away_s)

    def failed(self, exc: Exception) -> None:
        """The server did not answer, or said no."""
        self.connected = False
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            self._announced = now - self._last_line_at >= FLAP_S
            if self._announced:
                self._last_line_at = now
                logger.warning("%s; going on from the last view, trying again", exc)
