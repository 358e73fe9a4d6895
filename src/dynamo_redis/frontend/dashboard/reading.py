"""One frontend process as the dashboard sees it. Processes of one port pass it to each other as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable
from operator import add
from typing import Literal, NamedTuple

from pydantic import BaseModel

from dynamo_redis.frontend.admission import Admission
from dynamo_redis.frontend.dashboard.event_log import Event
from dynamo_redis.frontend.dashboard.recorder import Recorder
from dynamo_redis.frontend.dashboard.seconds import Second
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.frontend.routing import router_of
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.router.router_state import RouterState
from dynamo_redis.runtime.discovery import Member, State
from dynamo_redis.store.base import Registry

InstanceState = Literal[
    "down", "not ready", "failing", "silent", "suspect", "draining", "busy", "serving", "registered"
]
"""States of an instance on the page, the worst first. `registered`: no model is served there."""

STATES: tuple[InstanceState, ...] = (
    "down", "not ready", "failing", "silent", "suspect", "draining", "busy", "serving", "registered"
)  # fmt: skip

_SHOWN: dict[State, InstanceState] = {
    State.QUIET: "silent",
    State.EJECTED: "failing",
    State.SUSPECT: "suspect",
    State.DOWN: "down",
}


class RouterReading(BaseModel):
    """A router of a process. Lags are None while unknown; tokens are counted since its start."""

    router_id: str
    endpoint: str
    mode: str
    connected: bool | None = None
    lag_entries: int | None = None
    lag_s: float | None = None
    block_count: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    active_count: int = 0
    waiting_count: int = 0

    @classmethod
    def of(cls, state: RouterState) -> RouterReading:
        """Take the fields that the page shows."""
        return cls(
            router_id=state.router_id,
            endpoint=state.endpoint,
            mode=state.mode,
            connected=state.index.get("connected"),
            lag_entries=state.index.get("lag_count"),
            lag_s=state.index.get("lag_s"),
            block_count=state.index.get("block_count", 0),
            prompt_tokens=state.counts.prompt_tokens,
            cached_tokens=state.counts.cached_tokens,
            active_count=state.active_count,
            waiting_count=state.waiting_count,
        )


class WorkerBlocks(NamedTuple):
    """An instance's load by the bookings of all routers, and its blocks that the router knows."""

    requests: int
    used: int
    cached: int


class ProcessReading(BaseModel):
    """The state of one frontend process. Instances that serve and have no requests are left out of
    `members`."""

    pid: int
    redis_connected: bool
    redis_refusal: str | None = None
    waiting_count: int = 0
    """Requests that wait for a place at the frontend."""
    models: dict[str, tuple[int, int]] = {}
    """By model: the requests under way, and those without an item of their answer yet."""
    members: dict[str, tuple[InstanceState, int]] = {}
    """By name: the state, and the requests of this process."""
    routers: list[RouterReading] = []
    seconds: list[Second] = []
    events: list[Event] = []


def read_process(
    models: LiveModels, registry: Registry, recorder: Recorder, admission: Admission | None, since: int
) -> tuple[ProcessReading, dict[str, WorkerBlocks]]:
    """Read this process, with its counts since a second; and the load of its workers, where a router counts
    it."""
    routers = [router for router in map(router_of, models.clients()) if router is not None]
    states = [router.state() for router in routers]
    reading = ProcessReading(
        pid=os.getpid(),
        redis_connected=registry.connected,
        redis_refusal=registry.write_refusal,
        waiting_count=0 if admission is None else admission.waiting_count,
        models={
            name: (record.in_flight_count, record.queued_count)
            for name, record in recorder.metrics.models.items()
        },
        members=_read_members(recorder, _busy_names(models)),
        routers=[RouterReading.of(state) for state in states],
        seconds=recorder.history.since(since),
        events=list(recorder.events),
    )
    return reading, _read_blocks(states)


def _read_blocks(states: Iterable[RouterState]) -> dict[str, WorkerBlocks]:
    """Return the load of each instance: that of its ranks together."""
    blocks: dict[str, WorkerBlocks] = {}
    for state in states:
        for worker in state.workers:
            name = f"{state.endpoint}/{worker['instance_id']:x}"
            load = WorkerBlocks(worker["request_count"], worker["blocks"], worker["cached_blocks"])
            known = blocks.get(name)
            blocks[name] = load if known is None else WorkerBlocks(*map(add, known, load))
    return blocks


def _read_members(recorder: Recorder, busy: set[str]) -> dict[str, tuple[InstanceState, int]]:
    members: dict[str, tuple[InstanceState, int]] = {
        name: ("draining", member.in_flight) for name, member in recorder.draining.items()
    }
    for member, name in recorder.members().items():
        state = _state_of(member)
        if state == "serving" and name in busy:
            state = "busy"
        if state != "serving" or member.in_flight:
            members[name] = state, member.in_flight
    return members


def _state_of(member: Member) -> InstanceState:
    if member.state is State.UP:
        return "serving" if member.instance.ready else "not ready"
    return _SHOWN[member.state]


def _busy_names(models: LiveModels) -> set[str]:
    """Return the names of the instances that are busy by the thresholds of a model."""
    names: set[str] = set()
    for named in models.served():
        thresholds = models.thresholds.of(named.name)
        for version in named.loaded() if thresholds.is_set else ():
            router: KvRouter | None = router_of(version.client)
            if router is not None:
                names |= {f"{router.endpoint}/{found:x}" for found in router.busy_ids(thresholds)}
    return names
