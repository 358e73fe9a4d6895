"""The instances of one endpoint, as this process sees them.

The view follows the registry's watch at once, with these exceptions:

* A record that cannot be read never removes an instance: its last good record stays.
* An instance deleted on purpose is forgotten at once, and the requests that it is answering may finish.
* An instance that *expired* is forgotten too, and its pending requests fail with a retryable error. But if at
  least two instances, and at least half of the endpoint's, expire within one lease TTL, the cause is more
  likely the registry. They become *suspects*: chosen last, probed at once, and dropped when they refuse the
  probe or do not answer it within a second.
* An instance that is missing after a *resync* is a suspect even if it is the only one: it was not deleted,
  the
  registry lost its history.
* An instance that refuses a request is marked *down* here, long before its lease ends, and probed until it
  answers. It is chosen only if no other is left.
* An instance that is silent while a response is due is *quiet*: other instances are preferred. It is probed
  until it answers, or until its process does not answer either, which marks it down. It may only be slow, so
  requests sent to it stay there; requests that wait for a connection to it go elsewhere.
* An instance that fails one request after the other with an error of its own (`ejection.py`) is *ejected* for
  a pause, each longer than the one before; never more than half of the endpoint's instances at a time.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from contextvars import copy_context
from enum import Enum
from typing import Any, Protocol

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.errors import (
    CannotConnect,
    InstanceRemoved,
    NotAccepted,
    PlaneError,
    StoreUnavailable,
)
from dynamo_redis.names import EndpointName, parse_instance_id
from dynamo_redis.planes.base import RequestPlaneClient, Target
from dynamo_redis.runtime.ejection import FailureStreak, may_eject
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Delete, DeleteCause, Put, Record, Registry, WatchBatch
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 1.0
_PROBE_PAUSE_S = (0.1, 5.0)
"""The first and the longest pause between two probes of an instance that is down."""
_SLOW_PAUSE_S = 0.25
"""The pause between two probes of a quiet instance."""


class Pending(Protocol):
    """A request that waits for its first item."""

    @property
    def sent(self) -> bool: ...

    def fail(self, error: Exception) -> None: ...


class State(Enum):
    """The state of an instance in this process's view."""

    UP = "up"
    QUIET = "quiet"  # silent while a response is due
    EJECTED = "ejected"  # fails requests with errors of its own
    SUSPECT = "suspect"  # gone from the registry, together with many others
    DOWN = "down"  # did not answer a request or a probe


class _ProbeOutcome(Enum):
    """The outcome of a probe."""

    READY = "ready"
    SLOW = "slow"  # the process lives, its event loop is busy
    NONE = "none"


class Member:
    """One instance: its record, its state in this view, and this process's requests at it."""

    __slots__ = (
        "answered_probe",
        "failures",
        "in_flight",
        "instance",
        "instance_id",
        "pending",
        "state",
        "target",
    )

    def __init__(self, instance: Instance, target: Target) -> None:
        self.instance_id = instance.instance_id
        self.instance = instance
        self.target = target
        self.state = State.UP
        self.answered_probe = False
        self.failures = FailureStreak()
        self.in_flight = 0
        self.pending: set[Pending] = set()

    @property
    def listed(self) -> bool:
        """True if the instance can serve, as far as this process knows; a suspect too, until a probe
        fails."""
        return self.instance.ready and self.state is not State.DOWN

    @property
    def confirmed(self) -> bool:
        """True if the registry lists the instance, or it has answered since it vanished from there."""
        return self.listed and (self.state is not State.SUSPECT or self.answered_probe)

    def fail_pending(self, error: PlaneError, *, sent: bool = True) -> None:
        """Fail the requests that wait for a first item; with `sent=False` only those not sent yet."""
        for request in tuple(self.pending):
            if sent or not request.sent:
                request.fail(error)

    def __repr__(self) -> str:
        return f"<Member {self.instance_id:x} {self.state.value} in_flight={self.in_flight}>"


class EndpointView:
    """The live set of one endpoint's instances; one watch, shared by all clients of the endpoint.

    It owns one task that reads the watch, and one task for each instance that is probed or ejected. All end
    with `aclose`. The registry bounds the watch's queue: a reader that falls behind gets a resync.
    """

    def __init__(
        self,
        name: EndpointName,
        registry: Registry,
        plane: str,
        plane_client: RequestPlaneClient,
        *,
        lease_ttl_s: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.name = name
        self.candidates: list[Member] = []
        """The members to choose from first, ordered by instance id."""
        self.is_ending = False
        """True after `end_waits`: the process shuts down, and waits for an instance end."""
        self._members: dict[int, Member] = {}
        self._losses: dict[int, tuple[Member, float]] = {}
        self._elsewhere: dict[int, str] = {}
        """The planes of the instances that do not serve this client's."""
        self._registry = registry
        self._plane = plane
        self._plane_client = plane_client
        self._lease_ttl_s = lease_ttl_s
        self._clock = clock
        self._changed: asyncio.Event = asyncio.Event()
        self._first_state: asyncio.Event = asyncio.Event()
        self._supervisor = Supervisor(log, f"view of {name}")
        self._reader: asyncio.Task[None] | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self._variables = copy_context()

    # ----------------------------------------------------------------- lifetime

    async def start(self, timeout_s: float) -> None:
        """Start the watch and wait for its first state. Raises StoreUnavailable after `timeout_s`."""
        if self._reader is None:
            reading = follow(self._registry, self.name.instances_prefix, self.apply, self._supervisor)
            self._reader = asyncio.create_task(reading, name=f"view {self.name}")
        try:
            async with asyncio.timeout(timeout_s):
                await self._first_state.wait()
        except TimeoutError:
            raise StoreUnavailable(
                f"the registry did not list the instances of {self.name} in time"
            ) from None

    async def aclose(self) -> None:
        """End the watch and all probes."""
        tasks = [task for task in (self._reader, *self._probes) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ----------------------------------------------------------------- reading

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def get(self, instance_id: int) -> Member | None:
        """Return the member of that instance id, in any state; None if there is none."""
        return self._members.get(instance_id)

    def last_resorts(self) -> list[list[Member]]:
        """Return the members to choose from when no candidate is left.

        One list a state, best first: suspect, quiet, ejected, down. Instances whose event loop hangs (`ready`
        false) are in none of them.
        """
        ready = [member for member in self._members.values() if member.instance.ready]
        ranks = (State.SUSPECT, State.QUIET, State.EJECTED, State.DOWN)
        return [[member for member in ready if member.state is state] for state in ranks]

    async def wait_for_change(self) -> None:
        """Wait until the set of candidates changes, or `end_waits` is called."""
        await self._changed.wait()

    def end_waits(self) -> None:
        """End all waits for an instance: the process is shutting down."""
        self.is_ending = True
        self._changed.set()
        self._changed = asyncio.Event()

    # ----------------------------------------------------------------- outcomes of requests

    def mark_down(self, member: Member, reason: PlaneError, *, probe: bool = True) -> None:
        """Stop choosing an instance until it answers a probe or, without `probe`, is registered again.

        A suspect is dropped: it has no record, and it does not answer.
        """
        if member.state is State.DOWN or self._members.get(member.instance_id) is not member:
            return
        if member.state is State.SUSPECT:
            self._drop(member)
            return
        level = logging.WARNING if probe else logging.INFO  # to leave is no failure
        log.log(level, "instance %x of %s is down: %s", member.instance_id, self.name, reason)
        member.state = State.DOWN
        self._rebuild()
        if probe:
            self._spawn(self._probe_until_up(member))

    def note_quiet(self, target: Target) -> None:
        """Note that an instance is silent while a response is due: prefer others until it answers a probe."""
        member = self._members.get(target.instance_id)
        if member is None or member.target.address != target.address:
            return
        if member.state is State.UP:
            log.info("instance %x of %s is silent, preferring others", member.instance_id, self.name)
            member.state = State.QUIET
            self._rebuild()
            self._spawn(self._probe_quiet(member))
        if self.candidates or member.state is State.DOWN:
            member.fail_pending(CannotConnect(f"no connection to {target.address} yet"), sent=False)

    def note_failing(self, member: Member, reason: PlaneError) -> None:
        """Note an instance's own error; eject the instance after several in a row."""
        if not member.failures.add() or not self._is_current(member, State.UP):
            return
        ejected = [other for other in self._members.values() if other.state is State.EJECTED]
        if not may_eject(len(ejected), len(self.candidates) + len(ejected)):
            return
        pause_s = member.failures.next_pause_s()
        log.warning(
            "instance %x of %s fails one request after the other, it is passed over for %.1f s: %s",
            member.instance_id,
            self.name,
            pause_s,
            reason,
        )
        member.state = State.EJECTED
        self._rebuild()

        async def readmit() -> None:
            await asyncio.sleep(pause_s)
            if self._is_current(member, State.EJECTED):
                member.state = State.UP
                self._rebuild()

        self._spawn(readmit())

    async def answers_probe(self, member: Member) -> bool:
        """Probe an instance; return whether it answered. Marks it down or quiet if it did not."""
        outcome = await self._probe(member)
        if outcome is _ProbeOutcome.SLOW:
            self.note_quiet(member.target)
        elif outcome is _ProbeOutcome.NONE:
            self.mark_down(member, CannotConnect(f"no answer from {member.target.address}"))
        return outcome is _ProbeOutcome.READY

    async def refresh(self, member: Member) -> Member | None:
        """Read an instance's record again; return its member as it is now, or None if the record is gone."""
        key = self.name.instance_key(member.instance_id)
        record = await self._registry.get(key)
        if record is None:
            return None
        self._put(record)
        self._rebuild()
        return self._members.get(member.instance_id)

    def absence(self, instance_id: int | None = None) -> str:
        """Say why no instance, or not this one, can be chosen."""
        if instance_id is not None and instance_id in self._elsewhere:
            return self._other_plane(instance_id)
        if instance_id is not None:
            return f"instance {instance_id:x} is not among the {len(self)} known of {self.name}"
        if self._members:
            return f"none of the {len(self)} known instances of {self.name} can be chosen"
        return self.wrong_plane or f"no instance of {self.name} is known: is a worker running?"

    @property
    def wrong_plane(self) -> str | None:
        """The sentence that says so if all known instances serve other planes; else None."""
        if self._members or not self._elsewhere:
            return None
        return self._other_plane(next(iter(self._elsewhere)))

    def _other_plane(self, instance_id: int) -> str:
        return (
            f"instance {instance_id:x} of {self.name} serves {self._elsewhere[instance_id]}, "
            f"this client speaks {self._plane}: set the same DYN_REQUEST_PLANE"
        )

    # ----------------------------------------------------------------- the watch

    def apply(self, batch: WatchBatch) -> None:
        """Apply a batch of the watch. A record that cannot be read is skipped, and its key logged; the last
        good record of that instance stays."""
        lost: dict[str, Member] = {}

        def apply_event(event: Put | Delete) -> None:
            if isinstance(event, Put):
                self._put(event.record)
                lost.pop(event.record.key, None)  # it expired and was registered again within this batch
                return
            member = None
            with suppress(ValueError):  # a key that no process of this package writes
                instance_id = parse_instance_id(event.key.rpartition("/")[2])
                member = self._members.get(instance_id)
                self._elsewhere.pop(instance_id, None)
            if member is None:
                return
            # An expired instance that is down in this view, too, is dead beyond doubt.
            is_dead = event.cause is DeleteCause.EXPIRED and member.state is State.DOWN
            if event.cause in (DeleteCause.EXPIRED, DeleteCause.RESYNC) and not is_dead:
                lost[event.key] = member
                return
            del self._members[member.instance_id]
            if event.cause is DeleteCause.REVOKED or is_dead:
                self._fail_pending(member, is_over=not is_dead)

        self._supervisor.each(batch.events, apply_event, key_of)
        if lost:
            self._lose(list(lost.values()), history_lost=batch.resync is not None)
        self._rebuild()
        self._first_state.set()

    def _put(self, record: Record) -> None:
        instance = Instance.from_record(record)
        target = instance.target(self._plane)
        if target is None:
            self._elsewhere[instance.instance_id] = instance.planes
            log.warning("%s", self._other_plane(instance.instance_id))
            if (member := self._members.pop(instance.instance_id, None)) is not None:
                self._fail_pending(member, is_over=True)
            return
        self._elsewhere.pop(instance.instance_id, None)
        self._losses.pop(instance.instance_id, None)
        known = self._members.get(instance.instance_id)
        if known is None:
            self._members[instance.instance_id] = Member(instance, target)
        elif known.target != target:
            # The same id with another address or another secret is a new process. It has no request of the
            # old one, so requests that wait for the old one fail.
            self._members[instance.instance_id] = Member(instance, target)
            self._fail_pending(known, is_over=True)
        else:
            known.instance = instance
            if known.state is not State.EJECTED:  # the record does not tell whether its requests fail
                known.state = State.UP

    def _lose(self, lost: list[Member], *, history_lost: bool) -> None:
        """Forget instances that expired; make them suspects if too many were lost within one lease TTL."""
        now = self._clock.monotonic()
        for instance_id, (_, at) in tuple(self._losses.items()):
            if now - at > self._lease_ttl_s:
                del self._losses[instance_id]
        for member in lost:
            self._losses[member.instance_id] = (member, now)
        total = len(self._members.keys() | self._losses.keys())
        if history_lost or (len(self._losses) >= 2 and 2 * len(self._losses) >= total):
            log.warning(
                "%d of the instances of %s left the registry together: keeping those that answer",
                len(self._losses),
                self.name,
            )
            for member, _ in tuple(self._losses.values()):  # an eager task may drop its suspect at once
                if member.state is not State.SUSPECT:
                    member.state = State.SUSPECT
                    member.answered_probe = False
                    self._members[member.instance_id] = member
                    self._spawn(self._probe_suspect(member))
            return
        for member in lost:
            self._members.pop(member.instance_id, None)
            self._fail_pending(member)

    def _drop(self, member: Member) -> None:
        """Forget a suspect that did not answer."""
        del self._members[member.instance_id]
        self._losses.pop(member.instance_id, None)
        self._fail_pending(member)
        self._rebuild()

    def _fail_pending(self, member: Member, *, is_over: bool = False) -> None:
        """Fail the requests that wait for a first item from an instance that left.

        Requests that are being answered end with their connection, which the plane watches. If the process
        `is_over`, the plane's connection to it is closed, too; an expired process may only have lost Redis.
        """
        member.fail_pending(
            InstanceRemoved(f"instance {member.instance_id:x} of {self.name} left the registry")
        )
        if is_over:
            self._plane_client.forget(member.target)

    def _rebuild(self) -> None:
        candidates = [m for m in self._members.values() if m.state is State.UP and m.instance.ready]
        candidates.sort(key=lambda m: m.instance_id)
        if candidates != self.candidates:
            self.candidates = candidates
            # Present waiters hold the old event; later ones wait for the next change.
            self._changed.set()
            self._changed = asyncio.Event()

    # ----------------------------------------------------------------- probes

    def _spawn(self, probe: Coroutine[Any, Any, None]) -> None:
        # Not with the context variables of the failed request: the probe may outlive it by far.
        task = asyncio.create_task(probe, name=f"probe {self.name}", context=self._variables.copy())
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    def _is_current(self, member: Member, state: State) -> bool:
        return self._members.get(member.instance_id) is member and member.state is state

    async def _probe(self, member: Member) -> _ProbeOutcome:
        """Send one probe and wait for its outcome, at most `PROBE_TIMEOUT_S`. An error is logged."""
        try:
            await self._plane_client.probe(member.target, PROBE_TIMEOUT_S)
        except NotAccepted:
            return _ProbeOutcome.SLOW
        except PlaneError:
            return _ProbeOutcome.NONE
        except Exception as exc:  # noqa: BLE001 - logged, with its traceback
            self._supervisor.skip(f"the probe of instance {member.instance_id:x}", exc)
            return _ProbeOutcome.NONE
        return _ProbeOutcome.READY

    async def _probe_suspect(self, member: Member) -> None:
        """Probe a suspect until it is registered again; drop it at the first probe that it does not
        answer."""
        while self._is_current(member, State.SUSPECT):
            if await self._probe(member) is _ProbeOutcome.NONE:
                if self._is_current(member, State.SUSPECT):
                    self._drop(member)
                return
            member.answered_probe = True
            await asyncio.sleep(PROBE_TIMEOUT_S)

    async def _probe_quiet(self, member: Member) -> None:
        """Probe a quiet instance until it answers; mark it down if not even its process answers."""
        while self._is_current(member, State.QUIET):
            outcome = await self._probe(member)
            if not self._is_current(member, State.QUIET):
                return
            if outcome is _ProbeOutcome.READY:
                member.state = State.UP
                self._rebuild()
            elif outcome is _ProbeOutcome.NONE:
                self.mark_down(member, CannotConnect(f"no answer from {member.target.address}"))
            else:
                await asyncio.sleep(_SLOW_PAUSE_S)

    async def _probe_until_up(self, member: Member) -> None:
        """Probe an instance that is down until it answers, at growing, jittered intervals."""
        pause_s, longest_s = _PROBE_PAUSE_S
        while self._is_current(member, State.DOWN):
            await asyncio.sleep(pause_s * (0.5 + random.random() / 2))  # noqa: S311 - jitter
            pause_s = min(2 * pause_s, longest_s)
            outcome = await self._probe(member)
            if outcome is _ProbeOutcome.NONE or not self._is_current(member, State.DOWN):
                continue
            log.info("instance %x of %s answers again", member.instance_id, self.name)
            if outcome is _ProbeOutcome.READY:
                member.state = State.UP
                self._rebuild()
            else:
                member.state = State.QUIET
                self._spawn(self._probe_quiet(member))
