"""Log lines about what others cause, and may cause a thousand times a second: one a while says it."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from typing import Final

PAUSE_S: Final = 10.0
MAX_KINDS: Final = 64


class RateLimitedLog:
    """Logs at most one line in `pause_s` of each kind, with the number of those left out since the last one.

    At most `MAX_KINDS` kinds are told apart within `pause_s`: further ones are left out, and counted in the
    next line of any kind. What is left out is logged at debug.
    """

    __slots__ = ("_kinds", "_left_out_of_others", "_level", "_log", "_pause_s")

    def __init__(
        self, log: logging.Logger, level: int = logging.WARNING, *, pause_s: float = PAUSE_S
    ) -> None:
        self._pause_s = pause_s
        self._log = log
        self._level = level
        self._kinds: dict[Hashable, tuple[float, int]] = {}  # the one said longest ago is the first
        self._left_out_of_others = 0

    def say(
        self, text: str, *args: object, kind: Hashable = None, exc_info: BaseException | None = None
    ) -> None:
        """Log `text % args`, if it is time for a line of this kind: by default, of this text."""
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
            more = self._left_out(0 if known is None else known[1])
            self._log.log(self._level, "%s%s", text % args, more, exc_info=exc_info)
            return
        self._log.debug(text, *args, exc_info=exc_info)

    def _has_room(self, now: float) -> bool:
        """Whether one more kind can be remembered; the oldest is forgotten if its pause is over."""
        if len(self._kinds) < MAX_KINDS:
            return True
        oldest = next(iter(self._kinds))
        said_at, left_out_count = self._kinds[oldest]
        if now - said_at < self._pause_s:
            return False
        del self._kinds[oldest]
        self._left_out_of_others += left_out_count
        return True

    def _left_out(self, alike_count: int) -> str:
        others_count, self._left_out_of_others = self._left_out_of_others, 0
        if not alike_count and not others_count:
            return ""
        parts = [f"{alike_count} more of these"] * bool(alike_count)
        parts += [f"{others_count} of other kinds"] * bool(others_count)
        return f" ({' and '.join(parts)} since the last such line)"
