"""The state of Redis as a process sees it: answering, taking writes. Each change is logged once."""

from __future__ import annotations

import logging
import time
from typing import Final, Literal

from dynamo_redis.errors import StoreError

logger = logging.getLogger(__name__)

FLAP_S: Final = 5.0
"""Shortest time between two log lines of a server that comes and goes."""
REFUSAL_FLAP_S: Final = 30.0
"""The same for a server that takes writes only at times, since its memory is almost full."""

Writer = Literal["tick", "renewal"]
"""Writes that are made all the time. Each shows only whether the server takes writes of its kind."""


class Trouble:
    """A kind of trouble that begins and ends, with the decision whether to log that.

    A reason is logged at most once in `flap_s`, even if it comes and goes often. If it still lasts when that
    time has passed, it is logged then. An end is logged if the begin before it was logged.
    """

    def __init__(self, flap_s: float) -> None:
        self._flap_s = flap_s
        self._since: float | None = None
        self._announced: str | None = None
        self._lines_at: dict[str, float] = {}

    def begin(self, reason: str = "") -> bool:
        """Note that the trouble begins or lasts. Return whether to log that now."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if reason == self._announced or now - self._lines_at.get(reason, float("-inf")) < self._flap_s:
            return False
        self._lines_at = {was: at for was, at in self._lines_at.items() if now - at < self._flap_s}
        self._lines_at[reason] = now
        self._announced = reason
        return True

    def end(self) -> float | None:
        """Note that the trouble is over. Return its duration in seconds if its begin was logged, else
        None."""
        since, self._since = self._since, None
        announced, self._announced = self._announced, None
        return time.monotonic() - since if since is not None and announced is not None else None


class Health:
    """The last outcomes of reads and of writes, shared by all parts of a process that use one server."""

    def __init__(self, address: str) -> None:
        self.connected = False
        self.outage_count = 0
        """Times that the server ceased to answer."""
        self._address = address
        self._refusals: dict[Writer, str] = {}
        self._away = Trouble(FLAP_S)
        self._refusing = Trouble(REFUSAL_FLAP_S)

    @property
    def write_refusal(self) -> str | None:
        """The server's reason for taking no writes, or none that need memory, while it answers."""
        return next(iter(self._refusals.values()), None)

    def succeeded(self) -> None:
        """Note that the server answered a read."""
        self.connected = True
        away_s = self._away.end()
        if away_s is not None:
            logger.info("Redis at %s is back after %.1f s", self._address, away_s)

    def failed(self, exc: StoreError) -> None:
        """Note that the server did not answer a read, or refused it."""
        self.outage_count += self.connected
        self.connected = False
        if self._away.begin(exc.answer_code):
            logger.warning("%s; going on from the last view, trying again", exc)

    def refused(self, writer: Writer, exc: StoreError) -> None:
        """Note that a regular write failed. This counts only while the server answers reads."""
        if not self.connected or not exc.answered:
            return
        self._refusals[writer] = str(exc)
        if not self._refusing.begin(exc.answer_code):
            return
        if exc.refuses_writes:
            logger.warning(
                "%s; reads, watches and requests go on, no lease ends, registered keys follow later", exc
            )
        else:  # the refusal may concern reads as well
            logger.warning("%s; until then writes are refused, and some reads may be; requests go on", exc)

    def wrote(self, writer: Writer, *, full: bool = False) -> None:
        """Note that the server took a regular write. `full`: its memory is full, and this write needed
        none."""
        if full:
            self._refusals[writer] = f"Redis at {self._address} is out of memory: raise its maxmemory"
            if self._refusing.begin("OOM"):
                logger.warning(
                    "%s; reads, deletes and renewals of leases go on, what needs memory is refused",
                    self._refusals[writer],
                )
            return
        self._refusals.pop(writer, None)
        if self._refusals:
            return  # another kind of write is still refused
        refused_s = self._refusing.end()
        if refused_s is not None:
            logger.info("Redis at %s takes writes again, after %.1f s", self._address, refused_s)
