"""The part of the dashboard that always runs: once a second it looks for events and counts."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

from dynamo_redis.clock import SYSTEM_CLOCK, Clock
from dynamo_redis.frontend.dashboard.event_log import EventKind, EventLog
from dynamo_redis.frontend.dashboard.seconds import History, Second, Totals
from dynamo_redis.frontend.metrics.recording import FrontendMetrics
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.names import INSTANCES, EndpointName, format_instance_id
from dynamo_redis.router.answering import is_answer_endpoint
from dynamo_redis.runtime.discovery import Member, State
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Delete, DeleteCause, Put, Registry, WatchBatch
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.topics import CLEAR_KV_BLOCKS, KV_DUMP, LOAD_METRICS

log = logging.getLogger(__name__)

_LEFT: Final[dict[DeleteCause, EventKind]] = {
    DeleteCause.DELETED: "left",
    DeleteCause.REVOKED: "left",
    DeleteCause.EXPIRED: "lost",
    DeleteCause.RESYNC: "missing",
}
_TURNED: Final[dict[State, EventKind]] = {
    State.DOWN: "down",
    State.QUIET: "silent",
    State.EJECTED: "failing",
    State.SUSPECT: "suspect",
}

_ASIDE: Final = frozenset({KV_DUMP, LOAD_METRICS, CLEAR_KV_BLOCKS})


class Recorder:
    """Keeps the instances of all endpoints, the recent events, and the counts of the last minutes.

    `follow` and `note` are called by the dashboard's tasks. While nothing happens, `note` costs a look at
    each instance, some 0.1 ms for a thousand.
    """

    def __init__(self, models: LiveModels, registry: Registry, clock: Clock = SYSTEM_CLOCK) -> None:
        self.metrics = FrontendMetrics()
        """The counts that are looked at; replaced by the frontend's."""
        self.events = EventLog()
        self.history = History()
        self.instances: dict[str, Instance] = {}
        """The instances in the registry, by `name_of`, without endpoints that only go with another."""
        self.draining: dict[str, Member] = {}
        """Instances that have left and still answer requests of this process."""
        self._models = models
        self._registry = registry
        self.clock = clock
        self._is_first_batch = True
        self._keys: dict[str, str] = {}  # key in the registry → name
        self._named: dict[Member, str] = {}
        self._troubled: dict[str, tuple[State, str]] = {}  # name → state, endpoint
        self._served: set[str] | None = None
        self._totals = Totals()
        self._rejected_count = 0
        self._outages = registry.outages
        self._was_connected = True
        self._refusal: str | None = None
        self._supervisor = Supervisor(log, "the dashboard's instances")

    # ----------------------------------------------------------------- the registry

    async def follow(self) -> None:
        """Follow the instances of all endpoints, until the registry is closed."""
        await follow(self._registry, INSTANCES, self.apply, self._supervisor)

    def apply(self, batch: WatchBatch) -> None:
        """Apply changes of the registry, and note who joined and left."""
        changes: Counter[tuple[EventKind, str, str]] = Counter()

        def take(event: Put | Delete) -> None:
            key = key_of(event)
            if isinstance(event, Put):
                instance = Instance.from_record(event.record)
                if _is_aside(instance.name):
                    return
                name = name_of(instance)
                known = self.instances.get(name)
                self.instances[name], self._keys[key] = instance, name
                if known is None:
                    changes["joined", str(instance.name), format_instance_id(instance.instance_id)] += 1
                elif known.ready and not instance.ready:
                    changes["hangs", str(instance.name), format_instance_id(instance.instance_id)] += 1
            elif (gone := self.instances.pop(self._keys.pop(key, ""), None)) is not None:
                kind = _LEFT[event.cause]
                changes[kind, str(gone.name), format_instance_id(gone.instance_id)] += 1

        self._supervisor.each(batch.events, take, key_of)
        if not self._is_first_batch:
            now = self.clock.wall()
            for (kind, endpoint, instance_id), count in changes.items():
                self.events.add(now, kind, endpoint, count, instance_id)
        self._is_first_batch = False

    # ----------------------------------------------------------------- each second

    def note(self) -> None:
        """Note what has changed since the last call."""
        now = self.clock.wall()
        self._note_redis(now)
        self._note_models(now)
        self._note_members(now)
        totals = Totals.of(self.metrics)
        self.history.add(Second.between(int(now), self._totals, totals))
        rejected_count = sum(sum(model.rejected.values()) for model in self.metrics.models.values())
        counts: dict[EventKind, int] = {
            "migrated": totals.migrated - self._totals.migrated,
            "failed_over": totals.failed_over - self._totals.failed_over,
            "overloaded": rejected_count - self._rejected_count,
        }
        for kind, count in counts.items():
            if count > 0:
                self.events.add(now, kind, "", count)
        self._totals, self._rejected_count = totals, rejected_count

    def members(self) -> dict[Member, str]:
        """Return the instances that requests of this process may go to, in any state, with their names."""
        known = self._named
        return {
            member: known.get(member) or name_of(member.instance)
            for client in self._models.clients()
            for member in client.members()
        }

    def _note_redis(self, now: float) -> None:
        registry = self._registry
        is_connected = registry.connected
        if registry.outages != self._outages or (self._was_connected and not is_connected):
            if self._was_connected:
                self.events.add(now, "redis_lost", "Redis")
                self._was_connected = False
            self._outages = registry.outages
        if is_connected and not self._was_connected:
            self.events.add(now, "redis_back", "Redis")
        self._was_connected = is_connected
        refusal = registry.write_refusal if is_connected else None
        if refusal is not None and self._refusal is None:
            self.events.add(now, "redis_refuses", "Redis", detail=refusal)
        self._refusal = refusal

    def _note_models(self, now: float) -> None:
        served = {model.name for model in self._models.served()}
        if self._served is not None:
            for name in sorted(served - self._served):
                self.events.add(now, "model_served", name)
            for name in sorted(self._served - served):
                self.events.add(now, "model_ended", name)
        if served or self._served is not None:  # the models of the start are no news
            self._served = served

    def _note_members(self, now: float) -> None:
        members = self.members()
        for member in self._named.keys() - members.keys():
            if member.in_flight:
                self.draining[self._named[member]] = member
        self._named = members
        for name, member in list(self.draining.items()):
            if not member.in_flight:
                del self.draining[name]
        troubled: dict[str, tuple[State, str]] = {
            name: (member.state, str(member.instance.name))
            for member, name in members.items()
            if member.state is not State.UP
        }
        for name, (state, endpoint) in troubled.items():
            if self._troubled.get(name, (None,))[0] is not state:
                self.events.add(now, _TURNED[state], endpoint, detail=name.rpartition("/")[2])
        for name in self._troubled.keys() - troubled.keys():
            if name in self.instances:
                self.events.add(now, "recovered", self._troubled[name][1], detail=name.rpartition("/")[2])
        self._troubled = troubled


def _is_aside(endpoint: EndpointName) -> bool:
    """Return whether an endpoint only goes with another one of the same process, as that for its KV
    blocks."""
    return endpoint.endpoint in _ASIDE or is_answer_endpoint(endpoint)


def name_of(instance: Instance) -> str:
    """Return an instance's name on the page: `dynamo.backend.generate/694d98147d54bfde`."""
    return f"{instance.name}/{format_instance_id(instance.instance_id)}"
