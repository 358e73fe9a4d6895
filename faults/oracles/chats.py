"""Chats: none failed, and none went unanswered, while a worker lived."""

from __future__ import annotations

from typing import Final

from faults.history import Call, History
from faults.oracles.fates import Fates
from faults.oracles.violation import Violation, show

ANSWERED: Final = "no chat fails, whatever happens to Redis or to some of the workers"


def check(history: History) -> list[Violation]:
    """Check all chats of callers that lived. A chat that was under way when the run ended is no violation."""
    fates = Fates(history)
    return [
        _violation(call)
        for call in history.calls
        if call.action == "chat"
        and call.began_at < fates.ended_at
        and (call.outcome == "refused" or (call.outcome == "unknown" and _had_time(call, history, fates)))
    ]


def _had_time(call: Call, history: History, fates: Fates) -> bool:
    """Return whether its caller went on to other calls, or was still there when the run was quiet."""
    went_on = any(
        other.process == call.process and other.action == "chat" and other.number > call.number
        for other in history.calls
    )
    return went_on or (fates.is_present(call.process) and fates.ended_at < float("inf"))


def _violation(call: Call) -> Violation:
    if call.outcome == "refused":
        what = f"a chat failed: {call.answer.get('error') if isinstance(call.answer, dict) else call.answer}"
    else:
        what = "a chat was never answered"
    at = call.ended_at if call.outcome == "refused" else call.began_at
    return Violation("chats", ANSWERED, what, at, call.process, show(call))
