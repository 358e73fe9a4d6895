"""When an instance that is there, and answers with errors of its own, is passed over for a while. Pure.

A worker can be well by every probe while what stands behind it fails each request: an engine that answers
500, a key that it does not take, a handler that raises. Such a worker answers fast and looks idle, so every
policy that looks at load sends it more. Callers see it first, and each judges by what it has seen.
"""

from __future__ import annotations

import random
from typing import Final

FAILURE_COUNT: Final = 5
"""So many failures in a row, without an answer between them, say that it is not the requests."""

PAUSE_S: Final = (1.0, 60.0)
"""The first pause and the longest; each is twice the one before, until an answer comes."""


class Record:
    """The latest answers of one instance to this process."""

    __slots__ = ("_failure_count", "_pause_s")

    def __init__(self) -> None:
        self._failure_count = 0
        self._pause_s = PAUSE_S[0]

    def answered(self) -> None:
        """Note an answer: what failed before counts no more."""
        if self._failure_count:
            self._failure_count = 0
            self._pause_s = PAUSE_S[0]

    def failed(self) -> bool:
        """Note a failure. Tell whether there were enough."""
        self._failure_count += 1
        return self._failure_count >= FAILURE_COUNT

    def next_pause_s(self) -> float:
        """Take the next pause. After it the instance is on trial: its next failure is enough again."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, PAUSE_S[1])
        self._failure_count = FAILURE_COUNT - 1
        return pause_s * (0.75 + random.random() / 2)  # noqa: S311 - jitter


def may_eject(ejected_count: int, instance_count: int) -> bool:
    """Whether one more may be passed over: never more than half, so that a deployment whose requests all fail
    is not left without workers."""
    return 2 * (ejected_count + 1) <= instance_count
