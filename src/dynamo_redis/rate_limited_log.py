"""Log lines about events that a peer can cause a thousand times a second: at most one line each pause."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from typing import Final

PAUSE_S: Final = 10.0
MAX_KINDS: Final = 64


class RateLimitedLog:
    """Logs at most one line in `pause_s` of each kind, with the number of those left out since the last one.

    It remembers at most `MAX_KINDS` kinds within `pause_s`. Lines of further kinds are left out, and counted
    in the next line of any kind. A line that is left out is logged at debug.
    """

    __slots__ = ("_kinds", "_left_out_of_others", "_level", "_log", "_pause_s")

    def __init__(
        self, log: logging.Logger, level: int = logging.WARNING, *, pause_s: float = PAUSE_S
    ) -> None:
        self._pause_s = pause_s
        self._log = log
        self._level = level
        self._kinds: dict[
            Hashable, tuple[float, int]
        ] = {}  # kind: (time of its last line, lines left out since); the oldest is first
        self._left_out_of_others = 0

    def log(
        self, text: str, *args: object, kind: Hashable = None, exc_info: BaseException | None = None
    ) -> None:
        """Log `text % args` if the pause of its kind is over. The kind is the text unless given."""
        now = time.monotonic()
        if kind is None:
            kind = text
        known = self._kinds.get(kind)
        if known is not None and now - known[0] < self._pause_s:
            self._kinds[kind] = (known[0], known[1] + 1)
        elif known is None and not self._has_room(now):
            self._left_out_of_others += 1
        else:
            self._kinds.pop(kind, None)
            self._kinds[kind] = (now, 0)
            alike_count = 0 if known is None else known[1]
            others_count, self._left_out_of_others = self._left_out_of_others, 0
            parts = [f"{alike_count} more of these"] * bool(alike_count)
            parts += [f"{others_count} of other kinds"] * bool(others_count)
            more = f" ({' and '.join(parts)} since the last such line)" if parts else ""
            self._log.log(self._level, "%s%s", text % args, more, exc_info=exc_info)
            return
        self._log.debug(text, *args, exc_info=exc_info)

    def _has_room(self, now: float) -> bool:
        """Return whether one more kind can be remembered. Forgets the oldest kind if its pause is over."""
        if len(self._kinds) < MAX_KINDS:
            return True
        oldest = next(iter(self._kinds))
        said_at, left_out_count = self._kinds[oldest]
        if now - said_at < self._pause_s:
            return False
        del self._kinds[oldest]
        self._left_out_of_others += left_out_count
        return True
