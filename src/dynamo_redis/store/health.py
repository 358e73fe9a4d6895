"""Whether Redis answers, and whether it takes writes, with the log lines that say so: one a change."""

from __future__ import annotations

import logging
import time
from typing import Final

from dynamo_redis.errors import StoreError

logger = logging.getLogger(__name__)

FLAP_S: Final = 5.0
"""A server that comes and goes is mentioned once in so many seconds."""
REFUSAL_FLAP_S: Final = 30.0
"""One that takes writes now and then, since its memory is almost full, once in so many."""


class Trouble:
    """A kind of trouble that begins and ends: since when, and whether to log it."""

    def __init__(self, flap_s: float) -> None:
        self._flap_s = flap_s
        self._since: float | None = None
        self._announced = False
        self._last_line_at = float("-inf")

    def begin(self) -> bool:
        """Note that it is there. Answers whether to log that: once, unless it comes and goes."""
        if self._since is not None:
            return False
        self._since = now = time.monotonic()
        self._announced = now - self._last_line_at >= self._flap_s
        if self._announced:
            self._last_line_at = now
        return self._announced

    def end(self) -> float | None:
        """Note that it is over. Answers how long it lasted, if its begin was logged."""
        since, self._since = self._since, None
        return time.monotonic() - since if since is not None and self._announced else None


class Health:
    """The last outcomes of reading and of writing, for everything of a process that talks to one server."""

    def __init__(self, address: str) -> None:
        self.connected = False
        self.write_refusal: str | None = None
        """The server's reason for taking no writes, or none that need memory, while it answers."""
        self._address = address
        self._away = Trouble(FLAP_S)
        self._refusing = Trouble(REFUSAL_FLAP_S)

    def succeeded(self) -> None:
        """The server answered a read."""
        self.connected = True
        away_s = self._away.end()
        if away_s is not None:
            logger.info("Redis at %s is back after %.1f s", self._address, away_s)

    def failed(self, exc: Exception) -> None:
        """The server did not answer a read, or said no."""
        self.connected = False
        if self._away.begin():
            logger.warning("%s; going on from the last view, trying again", exc)

    def refused(self, exc: StoreError) -> None:
        """A write that any moment makes failed. It tells something of a server that answers reads."""
        if not self.connected or not exc.answered:
            return
        self.write_refusal = str(exc)
        if self._refusing.begin():
            logger.warning(
                "%s; reads, watches and requests go on, no lease ends, registered keys follow later",
                exc,
            )

    def wrote(self, *, full: bool) -> None:
        """The server took such a write. `full`: though its memory is full, since this one needs none."""
        if full:
            self.write_refusal = f"Redis at {self._address} is out of memory: raise its maxmemory"
            if self._refusing.begin():
                logger.warning(
                    "%s; reads, deletes and renewals of leases go on, what needs memory is refused",
                    self.write_refusal,
                )
            return
        self.write_refusal = None
        refused_s = self._refusing.end()
        if refused_s is not None:
            logger.info("Redis at %s takes writes again, after %.1f s", self._address, refused_s)
