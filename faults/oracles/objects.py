"""Objects: a read shows one whole version, the current one or one that was being put meanwhile.

Versions are identified by the SHA-256 of their content. Several puts may have the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from faults.history import Call, History
from faults.oracles.losses import Losses
from faults.oracles.violation import Violation, show

WHOLE: Final = "a reader sees the old object or the new one, never a mixture"
CURRENT: Final = "a read shows the version that was current, or one that was being put meanwhile"
KEPT: Final = "an object that was put is there until it is removed"

CHANGES: Final = frozenset({"object_put", "object_remove"})


def check(history: History) -> list[Violation]:
    """Check all objects of a run."""
    names: defaultdict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        if call.action in CHANGES or call.action == "object_get":
            names[call.arguments["name"]].append(call)
    losses = Losses(history)
    return [violation for calls in names.values() for violation in _Versions(calls, losses).check()]


class _Versions:
    """The versions of one object. `None` stands for its absence."""

    def __init__(self, calls: Sequence[Call], losses: Losses) -> None:
        self._losses = losses
        self._reads = [call for call in calls if call.action == "object_get" and call.outcome == "ok"]
        self._changes = [call for call in calls if call.action in CHANGES and call.outcome != "refused"]
        self._by_content: defaultdict[str | None, list[Call]] = defaultdict(list)
        for call in self._changes:
            self._by_content[_content(call)].append(call)
        self._visible_by = {id(call): call.ended_at for call in self._changes}
        for read in self._reads:
            content = read.answer["sha256"]
            made = self._by_content[content]
            # A version that one reader has seen is visible to later ones. Absence may precede the first put.
            if content is not None and len(made) == 1:
                self._visible_by[id(made[0])] = min(self._visible_by[id(made[0])], read.ended_at)

    def check(self) -> list[Violation]:
        """Check all reads."""
        return [violation for read in self._reads for violation in self._check_read(read)]

    def _check_read(self, read: Call) -> list[Violation]:
        content = read.answer["sha256"]
        name = read.arguments["name"]
        sources = [call for call in self._by_content[content] if call.began_at < read.ended_at]
        if not sources and content is not None:
            what = f"{name} was read as {content}, which no call had begun to put"
            return [_violation(WHOLE, what, read)]
        over = [self._replaced(source.ended_at, read) for source in sources]
        if content is None:
            over.append(self._replaced(float("-inf"), read))
        if any(call is None for call in over):
            return []
        replaced = next(call for call in reversed(over) if call is not None)
        if content is None:
            return [_violation(KEPT, f"{name} was not there, though it had been put", replaced, read)]
        what = f"{name} was read as {content}, which {_content(replaced)} had replaced"
        return [_violation(CURRENT, what, *sources[-1:], replaced, read)]

    def _replaced(self, ended_at: float, read: Call) -> Call | None:
        """Return a change that began after a version was whole, and was visible before the read began."""
        for call in self._changes:
            is_over = call.began_at > ended_at and self._visible_by[id(call)] < read.began_at
            if is_over and not self._losses.between(call.began_at, read.ended_at):
                return call
        return None


def _content(call: Call) -> str | None:
    return call.arguments["sha256"] if call.action == "object_put" else None


def _violation(promise: str, what: str, *calls: Call) -> Violation:
    last = calls[-1]
    return Violation("objects", promise, what, last.ended_at, last.process, show(*calls))
