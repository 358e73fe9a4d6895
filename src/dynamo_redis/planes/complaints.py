"""Log lines about what others cause, and may cause a thousand times a second: one a while says it."""

from __future__ import annotations

import logging
import time
from typing import Final

PAUSE_S: Final = 10.0


class Complaints:
    """Logs at most one line in `PAUSE_S` of each kind, with the number of those left out since the last one.

    A kind is a text as it stands in the code, with its placeholders, so their number is bounded. What is left
    out is logged at debug.
    """

    __slots__ = ("_kinds", "_level", "_log")

    def __init__(self, log: logging.Logger, level: int = logging.WARNING) -> None:
        self._log = log
        self._level = level
        self._kinds: dict[str, tuple[float, int]] = {}

    def say(self, text: str, *args: object) -> None:
        """Log `text % args`, if it is time for a line of this kind."""
        now = time.monotonic()
        said_at, left_out_count = self._kinds.get(text, (float("-inf"), 0))
        if now - said_at < PAUSE_S:
            self._kinds[text] = (said_at, left_out_count + 1)
            self._log.debug(text, *args)
            return
        self._kinds[text] = (now, 0)
        more = f" ({left_out_count} more of these since the last such line)" if left_out_count else ""
        self._log.log(self._level, "%s%s", text % args, more)
