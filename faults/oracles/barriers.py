"""Barriers: all processes that complete one saw one leader's data, and none goes on before all have come.

A leader's data names its round. `part` names one process's part in one barrier, from `barrier_lead` or
`barrier_join` to `barrier_leave`. After that, or after the process's death, its keys are gone: at once, or
once all faults are over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from dynamo_redis.names import BARRIERS
from faults.history import Call, History
from faults.oracles.calm import Calm
from faults.oracles.fates import Fates
from faults.oracles.violation import Violation, show

ONE_LEADER: Final = (
    "all workers that complete a round saw the same data, of a leader that completed it with them"
)
ALL_CAME: Final = "no worker completes a barrier before as many workers came as it counts"
TRUE_REASON: Final = "a refusal gives its reason, and the reason is true"
IN_TIME: Final = "a barrier ends within its time-out"
NONE_LEFT: Final = "in the end there are no keys of barriers that all members have left"

LATE_S: Final = 6.0
"""Longest time in seconds by which a call may exceed its time-out: an attempt under way, and the writes that
end the barrier, each with a time-out of its own."""

WATCH_LAG_S: Final = 1.0
"""Longest lag of a watch in seconds: a key that a worker learns of by it may just have gone."""


def check(history: History) -> list[Violation]:
    """Check all barriers of a run."""
    judge = _Barriers(history)
    violations = [*judge.leads(), *judge.joins(), *judge.refusals(), *judge.times()]
    for state in history.of("state"):
        left = [key for key in state.fields["records"] if key.startswith(BARRIERS)]
        violations += (
            Violation("exclusive", NONE_LEFT, f"{key} stands, but all members have left", state.at, "?")
            for key in left
        )
    return violations


class _Barriers:
    def __init__(self, history: History) -> None:
        self._calm = Calm(history)
        self._end = Fates(history).ended_at
        self._leads = [call for call in history.calls if call.action == "barrier_lead"]
        self._joins = [call for call in history.calls if call.action == "barrier_join"]
        self._left = {
            call.arguments["part"]: call for call in history.calls if call.action == "barrier_leave"
        }
        self._killed = {note.fields["process"]: note.at for note in history.of("killed")}

    # ------------------------------------------------------------------ presence

    def _gone_at(self, call: Call) -> float:
        """Return the latest time at which all keys that a call wrote were gone."""
        left = self._left.get(call.arguments["part"])
        if left is None or left.ended_at == float("inf"):
            over_at = self._killed.get(call.process, self._end)
        elif not self._calm.troubled(call.began_at, left.ended_at, call.process):
            return left.ended_at
        else:
            over_at = left.ended_at
        return self._calm.settled_after(over_at, call.process)

    def _was_there(self, call: Call, begin: float, end: float) -> bool:
        return call.began_at <= end and self._gone_at(call) >= begin

    def _came(self, lead: Call, by: float) -> set[str]:
        """Return the ids of the workers that may have come to this leader by then."""
        barrier = lead.arguments["barrier"]
        return {
            join.arguments["worker"]
            for join in self._joins
            if join.arguments["barrier"] == barrier and self._was_there(join, lead.began_at, by)
        }

    # ------------------------------------------------------------------ rounds

    def leads(self) -> Iterator[Violation]:
        """Check that a leader released as many workers as it counts, and that they had come."""
        for lead in self._leads:
            if lead.outcome != "ok":
                continue
            workers, count = lead.answer["workers"], lead.arguments["count"]
            absent = set(workers) - self._came(lead, lead.ended_at)
            if len(set(workers)) != count or len(workers) != count or absent:
                who = f"; of these {', '.join(sorted(absent))} never came" if absent else ""
                what = f"counted {workers} where it waits for {count}{who}"
                yield _violation(ALL_CAME, what, lead)

    def joins(self) -> Iterator[Violation]:
        """Check that a worker went on with its leader, and not too early."""
        leads = {call.arguments["part"]: call for call in self._leads}
        completed: dict[tuple[str, str], Call] = {}
        for join in self._joins:
            if join.outcome != "ok":
                continue
            data, worker = join.answer["data"], join.arguments["worker"]
            lead = leads.get(data)
            if lead is None or lead.began_at > join.ended_at:
                yield _violation(ONE_LEADER, f"{worker} saw {data}, which no leader had published", join)
                continue
            other = completed.setdefault((data, worker), join)
            if other is not join:
                what = f"{worker} completed the round of {data} twice, in {other.process} and {join.process}"
                yield _violation(ALL_CAME, what, lead, other, join)
            yield from self._with_leader(lead, join)

    def _with_leader(self, lead: Call, join: Call) -> Iterator[Violation]:
        data, worker = lead.arguments["part"], join.arguments["worker"]
        if lead.outcome == "ok" and worker not in lead.answer["workers"]:
            what = f"{worker} completed the round of {data}, whose leader counted {lead.answer['workers']}"
            yield _violation(ONE_LEADER, what, lead, join)
        if lead.outcome == "refused" and not self._may_have_completed(lead):
            what = f"{worker} completed the round of {data}, whose leader gave up"
            yield _violation(ONE_LEADER, what, lead, join)
        came, count = self._came(lead, join.ended_at), lead.arguments["count"]
        if len(came) < count:
            what = f"{worker} completed the round of {data} when {len(came)} of {count} workers had come"
            yield _violation(ALL_CAME, what, lead, join)

    def _may_have_completed(self, lead: Call) -> bool:
        """Return whether a leader may have released its workers. A failed one may have, too, if the answer to
        that was lost."""
        return lead.outcome != "refused" or self._calm.troubled(lead.began_at, lead.ended_at, lead.process)

    # ------------------------------------------------------------------ refusals

    def refusals(self) -> Iterator[Violation]:
        """Check that refusals gave a true reason."""
        for call in (*self._leads, *self._joins):
            if call.outcome == "refused" and not self._is_true(call, call.answer["reason"]):
                yield _violation(TRUE_REASON, f"was told {call.answer['reason']!r}, which is not true", call)

    def _is_true(self, call: Call, reason: str) -> bool:
        if "has a leader already" in reason:
            return any(not _is_duplicate(lead) for lead in self._others(self._leads, call))
        if "already" in reason:
            return any(
                join.arguments["worker"] == call.arguments["worker"] and not _is_duplicate(join)
                for join in self._others(self._joins, call)
            )
        if "was aborted" in reason:
            return any(lead.outcome != "ok" for lead in self._others(self._leads, call, WATCH_LAG_S))
        if "was complete" in reason:
            return any(map(self._may_have_completed, self._others(self._leads, call, WATCH_LAG_S)))
        return True

    def _others(self, calls: Iterable[Call], call: Call, lag_s: float = 0.0) -> list[Call]:
        """Return the other calls of the same barrier that had keys during a call, or up to `lag_s` before."""
        return [
            other
            for other in calls
            if other is not call
            and other.arguments["barrier"] == call.arguments["barrier"]
            and self._was_there(other, call.began_at - lag_s, call.ended_at)
        ]

    # ------------------------------------------------------------------ time-outs

    def times(self) -> Iterator[Violation]:
        """Check that calls end in time, apart from the time for which their process was stopped."""
        for call in (*self._leads, *self._joins):
            if call.began_at >= self._end:
                continue
            ended_at = self._ended_at(call)
            took_s = ended_at - call.began_at - self._calm.stopped_s(call.process, call.began_at, ended_at)
            if took_s > call.arguments["timeout_s"] + LATE_S:
                what = f"waited {took_s:.1f} s in a barrier with {call.arguments['timeout_s']:.1f} s to wait"
                yield _violation(IN_TIME, what, call)

    def _ended_at(self, call: Call) -> float:
        """Return the latest time at which a call was over for its process: when the process went on, died, or
        the run ended."""
        left = self._left.get(call.arguments["part"])
        went_on_at = self._end if left is None else left.began_at
        ended_at = min(call.ended_at, went_on_at, self._killed.get(call.process, self._end))
        return call.began_at if ended_at == float("inf") else ended_at


def _is_duplicate(call: Call) -> bool:
    """Return whether the call was refused because of another process, and so never wrote to the registry."""
    return call.outcome == "refused" and "already" in call.answer["reason"]


def _violation(promise: str, what: str, *calls: Call) -> Violation:
    last = max(calls, key=lambda call: call.began_at)
    at = last.ended_at if last.ended_at < float("inf") else last.began_at
    return Violation("exclusive", promise, what, at, last.process, show(*calls))
