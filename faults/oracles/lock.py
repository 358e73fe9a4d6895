"""Locks: protected writes are accepted from one holder at a time, the latest, and reads show them.

A holder that was stopped past its lease may still believe that it holds the lock; only accepted writes count.
All comparisons are of calls that did not overlap, so their order is certain, and of times between which no
data was lost: an asynchronous failover may lose the grant of a lock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from faults.history import Call, History
from faults.oracles.losses import Losses
from faults.oracles.violation import Violation, show

ONE_HOLDER: Final = "a lock has one holder at a time: a fencing token is granted once"
NO_STALE_WRITE: Final = "once another holds the lock, no write of an earlier holder is accepted"
TOKENS_RISE: Final = "tokens of accepted writes never go back"
READS: Final = "a read shows the last accepted write"

ACTIONS: Final = frozenset({"lock_acquire", "lock_write", "lock_release", "lock_read"})


def check(history: History) -> list[Violation]:
    """Check all locks of a run."""
    locks: defaultdict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        if call.action in ACTIONS:
            locks[call.arguments["lock"]].append(call)
    losses = Losses(history)
    violations: list[Violation] = []
    for name, calls in locks.items():
        acquired = [call for call in calls if call.action == "lock_acquire" and call.outcome == "ok"]
        accepted = [call for call in calls if call.action == "lock_write" and call.outcome == "ok"]
        violations += _check_grants(name, acquired, losses)
        violations += _check_stale(name, acquired, accepted, losses)
        violations += _check_rising(name, accepted, losses)
        violations += _check_reads(name, calls, losses)
    return violations


def _check_grants(name: str, acquired: Sequence[Call], losses: Losses) -> list[Violation]:
    violations = []
    by_token: dict[int, Call] = {}
    for call in acquired:
        token = call.answer["token"]
        other = by_token.setdefault(token, call)
        if other is not call and not losses.between(other.began_at, call.ended_at):
            what = f"lock {name}: token {token} was granted to {other.process} and to {call.process}"
            violations.append(_violation(ONE_HOLDER, what, other, call))
    return violations


def _check_stale(
    name: str, acquired: Sequence[Call], accepted: Sequence[Call], losses: Losses
) -> list[Violation]:
    """Check that no write is accepted that began after a later holder's grant had been answered."""
    grants = {call.answer["token"]: call for call in acquired}
    violations = []
    for write in accepted:
        grant = grants.get(write.arguments["token"])
        if grant is None:
            what = f"lock {name}: a write of {write.process} was accepted with a token that was never granted"
            violations.append(_violation(NO_STALE_WRITE, what, write))
            continue
        later = [
            call
            for call in acquired
            if call.began_at > grant.ended_at
            and call.ended_at < write.began_at
            and not losses.between(call.began_at, write.ended_at)
        ]
        if later:
            what = (
                f"lock {name}: {write.process} wrote as holder after {later[-1].process} had been granted it"
            )
            violations.append(_violation(NO_STALE_WRITE, what, grant, later[-1], write))
    return violations


def _check_rising(name: str, accepted: Sequence[Call], losses: Losses) -> list[Violation]:
    violations = []
    by_end = sorted(accepted, key=lambda call: call.ended_at)
    highest: Call | None = None
    ended = 0
    for write in accepted:
        while by_end[ended].ended_at < write.began_at:
            if highest is None or by_end[ended].arguments["token"] >= highest.arguments["token"]:
                highest = by_end[ended]
            ended += 1
        if highest is None or write.arguments["token"] >= highest.arguments["token"]:
            continue
        if losses.between(highest.began_at, write.ended_at):
            highest = None
            continue
        tokens = f"{highest.arguments['token']}, then one with {write.arguments['token']}"
        what = f"lock {name}: a write was accepted with token {tokens}"
        violations.append(_violation(TOKENS_RISE, what, highest, write))
    return violations


def _check_reads(name: str, calls: Sequence[Call], losses: Losses) -> list[Violation]:
    writes = {call.arguments["value"]: call for call in calls if call.action == "lock_write"}
    accepted = [call for call in writes.values() if call.outcome == "ok"]
    violations = []
    for read in calls:
        if read.action != "lock_read" or read.outcome != "ok":
            continue
        value = read.answer["value"]
        source = writes.get(value)
        if value is not None and (source is None or source.outcome == "refused"):
            how = "was never written" if source is None else "was refused"
            what = f"lock {name}: a read showed {value}, which {how}"
            violations.append(_violation(READS, what, *([source] if source else []), read))
            continue
        if source is not None and read.answer["token"] != source.arguments["token"]:
            what = f"lock {name}: a read showed {value} with token {read.answer['token']}, which is another's"
            violations.append(_violation(READS, what, source, read))
        source_ended = source.ended_at if source is not None else float("-inf")
        over = [
            call
            for call in accepted
            if call.began_at > source_ended
            and call.ended_at < read.began_at
            and not losses.between(call.began_at, read.ended_at)
        ]
        if over:
            what = f"lock {name}: a read showed {value}, which {over[-1].arguments['value']} had replaced"
            violations.append(_violation(READS, what, *([source] if source else []), over[-1], read))
    return violations


def _violation(promise: str, what: str, *calls: Call) -> Violation:
    last = max(calls, key=lambda call: call.began_at)
    return Violation("lock", promise, what, last.ended_at, last.process, show(*calls))
