"""Ports: one tenant each, a range whole or not at all, and no ports of tenants that are gone.

A tenant believes in a port from the answer to its `reserve` until it begins to `release` it, is told that it
is `lost`, or is killed. Two tenants may believe in one port for a while when the registry's data was lost, or
when the lease of one of them ended (it could not reach Redis, or stood still). Then that tenant has to be
told soon after the faults are over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dynamo_redis.names import PORTS
from faults.history import Call, History, Note
from faults.oracles.calm import Calm
from faults.oracles.fates import Fates
from faults.oracles.losses import Losses
from faults.oracles.violation import Violation, show

ONE_TENANT: Final = "a port has one tenant, unless data was lost or a lease ended"
LOSS_REPORTED: Final = "a tenant that lost a port to another is told soon after all faults are over"
WHOLE: Final = "a range is consecutive, within the requested one, and reserved as a whole or not at all"
FOR_CAUSE: Final = "a port is reported lost only to another tenant, after a loss of data or the lease's end"
STANDS: Final = "in the end the ports of the tenants stand in the registry, under their leases"
NONE_LEFT: Final = "in the end there are no ports of tenants that are dead or have released them"

LOG_LAG_S: Final = 1.0
"""Longest delay in seconds with which the observer notes the end of a lease."""


@dataclass(frozen=True, slots=True)
class Tenancy:
    """A process's belief in one port, from `since` to `until`. `loss_note` reports
    its loss, if it was reported."""

    key: str
    reserve: Call
    until: float
    loss_note: Note | None

    @property
    def process(self) -> str:
        """The process that believes."""
        return self.reserve.process

    @property
    def since(self) -> float:
        """The time at which it learned that it has the port."""
        return self.reserve.ended_at


def check(history: History) -> list[Violation]:
    """Check all reservations of a run."""
    judge = _Ports(history)
    violations = [*judge.ranges(), *judge.overlaps(), *judge.losses()]
    state = next(history.of("state"), None)
    return violations if state is None else [*violations, *judge.state(state)]


class _Ports:
    def __init__(self, history: History) -> None:
        self._fates = Fates(history)
        self._data_losses = Losses(history)
        self._calm = Calm(history)
        self._reserves = [call for call in history.calls if call.action == "reserve"]
        self._lost = [
            note for note in history.of("lost") if "reservation" in note.fields and note.at < self._end
        ]
        self._expired: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for note in history.of("log"):
            if note.fields["kind"] == "x":
                self._expired[note.fields["key"], note.fields["lease"]].append(note.at)
        self._tenancies = list(self._follow(history))

    @property
    def _end(self) -> float:
        return self._fates.ended_at

    def _follow(self, history: History) -> Iterator[Tenancy]:
        released = {
            call.arguments["reservation"]: call.began_at for call in history.calls if call.action == "release"
        }
        lost = {(note.fields["reservation"], note.fields["key"]): note for note in reversed(self._lost)}
        killed = {note.fields["process"]: note.at for note in history.of("killed")}
        for call in self._reserves:
            if call.outcome != "ok" or call.ended_at >= self._end:
                continue
            name, infinity = call.arguments["reservation"], float("inf")
            until = min(self._end, released.get(name, infinity), killed.get(call.process, infinity))
            for key in call.answer["keys"]:
                loss_note = lost.get((name, key))
                yield Tenancy(key, call, until if loss_note is None else min(until, loss_note.at), loss_note)

    # ------------------------------------------------------------------ while it runs

    def ranges(self) -> Iterator[Violation]:
        """Check that each reservation is the requested one."""
        for call in self._reserves:
            if call.outcome != "ok":
                continue
            asked, got = call.arguments, [int(key.rpartition("/")[2]) for key in call.answer["keys"]]
            first = got[0] if got else 0
            is_within = asked["first"] <= first and first + asked["count"] <= asked["end"]
            if not is_within or got != list(range(first, first + asked["count"])):
                wanted = f"{asked['count']} ports of {asked['first']}-{asked['end'] - 1}"
                what = f"asked for {wanted}, was given {got}"
                yield Violation("exclusive", WHOLE, what, call.ended_at, call.process, show(call))

    def overlaps(self) -> Iterator[Violation]:
        """Check that no process believes in another's port, except for a cause and a limited time."""
        by_key: defaultdict[str, list[Tenancy]] = defaultdict(list)
        for tenancy in sorted(self._tenancies, key=lambda one: one.since):
            others = by_key[tenancy.key]
            others[:] = [other for other in others if other.until > tenancy.since]
            for other in others:
                if tenancy.until > tenancy.since:
                    yield from self._overlap(other, tenancy)
            others.append(tenancy)

    def _overlap(self, one: Tenancy, other: Tenancy) -> Iterator[Violation]:
        """Check a tenancy `other` that began during the tenancy `one`."""
        begin, end = other.since, min(one.until, other.until)
        events = [
            event for each in (one, other) for event in (each.reserve, each.loss_note) if event is not None
        ]
        if not self._may_lose(one.reserve, one.key, begin) and not self._may_lose(
            other.reserve, one.key, begin
        ):
            what = f"{one.key} was {other.process}'s while it was {one.process}'s, for {end - begin:.3f} s"
            yield Violation("exclusive", ONE_TENANT, what, begin, other.process, show(*events))
        elif end > self._calm.settled_after(begin, one.process, other.process):
            both = f"{one.process}'s and {other.process}'s"
            what = f"{one.key} was {both} for {end - begin:.1f} s, and neither was told"
            yield Violation("exclusive", LOSS_REPORTED, what, end, one.process, show(*events))

    def _may_lose(self, reserve: Call, key: str, by: float) -> bool:
        """Return whether another process may have taken a port reserved by this call until then."""
        leases = self._fates.leases[reserve.process]
        return self._data_losses.between(reserve.began_at, by) or any(
            reserve.began_at <= at <= by + LOG_LAG_S for lease in leases for at in self._expired[key, lease]
        )

    def losses(self) -> Iterator[Violation]:
        """Check that each reported loss happened, and was reported to the right process."""
        reserves = {call.arguments["reservation"]: call for call in self._reserves}
        for note in self._lost:
            reserve, key = reserves[note.fields["reservation"]], note.fields["key"]
            is_wanted = any(
                call.process != note.process and call.began_at < note.at for call in self._reserves
            )
            if note.fields["reason"] != "conflict":
                what = f"was told that {key} was {note.fields['reason']}; no process deletes another's port"
            elif not is_wanted:
                what = f"was told that {key} is another's, but no other process had asked for one"
            elif not self._may_lose(reserve, key, note.at):
                what = f"was told that {key} is another's, though its lease lived and no data was lost"
            else:
                continue
            yield Violation("exclusive", FOR_CAUSE, what, note.at, note.process, show(reserve, note))

    # ------------------------------------------------------------------ in the end

    def state(self, state: Note) -> Iterator[Violation]:
        """Check that the registry and the tenants agree."""
        records: Mapping[str, Any] = state.fields["records"]
        owners = {lease: process for process, leases in self._fates.leases.items() for lease in leases}
        held = {(one.process, one.key): one for one in self._tenancies if one.until >= self._end}
        for (process, key), tenancy in held.items():
            found = records.get(key)
            if self._fates.is_present(process) and (found is None or owners.get(found[1]) != process):
                whose = "is missing" if found is None else f"stands under lease {found[1]}"
                what = f"{key}, which live {process} holds, {whose}"
                yield Violation("exclusive", STANDS, what, state.at, process, show(tenancy.reserve))
        for key, (_, lease, _) in records.items():
            process = owners.get(lease, "no process")
            if key.startswith(PORTS) and (process, key) not in held:
                what = f"{key} stands for {process} ({self._fates.of(process)}), which does not hold it"
                yield Violation("exclusive", NONE_LEFT, what, state.at, process)
