"""The recent events of a deployment, as one frontend process sees them. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

EVENT_COUNT: Final = 200
"""Events that are kept; the oldest go first."""

_TOGETHER_S: Final = 5.0
_LOOK_BACK_COUNT: Final = 8

EventKind = Literal[
    "joined", "left", "lost", "missing", "down", "silent", "failing", "suspect", "recovered", "hangs",
    "migrated", "failed_over", "overloaded", "model_served", "model_ended", "redis_lost", "redis_back",
    "redis_refuses",
]  # fmt: skip

OWN_KINDS: Final[frozenset[EventKind]] = frozenset(
    {"down", "silent", "failing", "suspect", "recovered", "migrated", "failed_over", "overloaded"}
)
"""Events of a process of its own. The others are the same in all processes of a frontend."""


@dataclass(slots=True)
class Event:
    """One event, or several of one kind about one subject in quick succession.

    `at` is the time of the first one, in seconds since 1970. `detail` belongs to a single one: an instance
    id, or a reason.
    """

    number: int
    at: float
    kind: EventKind
    subject: str
    count: int
    detail: str


class EventLog:
    """The last `EVENT_COUNT` events. A thousand workers that join together are one of them."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=EVENT_COUNT)
        self._number = 0

    def add(self, at: float, kind: EventKind, subject: str, count: int = 1, detail: str = "") -> None:
        """Note an event, or let it join one that has just happened."""
        for known in list(self._events)[-_LOOK_BACK_COUNT:]:
            if (known.kind, known.subject) == (kind, subject) and 0 <= at - known.at < _TOGETHER_S:
                known.count += count
                known.detail = ""
                return
        self._number += 1
        self._events.append(Event(self._number, at, kind, subject, count, detail if count == 1 else ""))

    def __iter__(self) -> Iterator[Event]:
        """Iterate over the events, oldest first."""
        return iter(self._events)
