"""A process that reserves ports which other processes want as well, and takes part in barriers, as leader or
as worker.

Its users of ports do as `dynamo_redis.runtime.ports` advises: when a user is told that one of its ports is
lost, it gives the whole reservation up. Ports that are reserved when the process must rest stay reserved;
barriers are left.

Each reservation and each part in a barrier has a name of its own, so that later notes of it (`lost`,
`release`, `barrier_leave`) cannot be taken for another's.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from dynamo_redis.errors import BarrierError, PortUnavailable
from dynamo_redis.names import format_instance_id, port_key
from dynamo_redis.runtime.barrier import LeaderBarrier, WorkerBarrier
from dynamo_redis.runtime.ports import PortReservation, reserve_ports
from dynamo_redis.store.base import LostReason
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.history import Outcome
from faults.roles.base import Process

HOST: Final = "tenement"
FIRST_PORT: Final = 29400
PORTS_COUNT: Final = 10
USERS_COUNT: Final = 2
MOST_PORTS_COUNT: Final = 3
HOLD_S: Final = 0.8
"""Longest time in seconds for which ports are kept."""

BARRIER: Final = "group"
MEMBERS_COUNT: Final = 2
WORKERS: Final = ("w0", "w1", "w2", "w3")
WORKERS_COUNT: Final = 2
LEADS: Final = 0.2
"""Part of the barriers in which a member leads rather than joins."""
BARRIER_TIMEOUT_S: Final = 2.5
STAY_S: Final = 0.1
"""Longest time in seconds for which a barrier stands after its end, for late members."""


async def run(process: Process) -> None:
    """Reserve, release, lead and join until told to rest; then keep the held ports."""
    registry = await process.open_registry()
    process.recorder.note("started", role="tenant", lease=format_instance_id(registry.lease_id))
    try:
        users = [_User(process, registry) for _ in range(USERS_COUNT)]
        members = [_Member(process, registry) for _ in range(MEMBERS_COUNT)]
        await asyncio.gather(*(user.run() for user in users), *(member.run() for member in members))
        await asyncio.Event().wait()
    finally:
        await registry.aclose()


class _User:
    """Has one reservation at a time."""

    def __init__(self, process: Process, registry: RedisRegistry) -> None:
        self._process = process
        self._registry = registry

    async def run(self) -> None:
        while not self._process.resting.is_set():
            await self._reserve_and_release()
            await self._process.pause()

    async def _reserve_and_release(self) -> None:
        """Reserve, and give back after a while, at once when a port is lost; not at all when resting."""
        name, is_lost = self._process.new_value(), asyncio.Event()
        reservation = await self._reserve(name, is_lost)
        if reservation is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._process.rng.uniform(0, HOLD_S)):
                await is_lost.wait()
        if self._process.resting.is_set():
            await is_lost.wait()
        await self._release(name, reservation)

    async def _reserve(self, name: str, is_lost: asyncio.Event) -> PortReservation | None:
        count = self._process.rng.randint(1, MOST_PORTS_COUNT)
        end = FIRST_PORT + PORTS_COUNT
        reserved: list[PortReservation] = []

        def on_lost(port: int, reason: LostReason) -> None:
            self._process.recorder.note("lost", key=port_key(HOST, port), reason=reason, reservation=name)
            is_lost.set()

        async def attempt() -> tuple[Outcome, Any]:
            try:
                made = await reserve_ports(
                    self._registry,
                    HOST,
                    count=count,
                    port_range=(FIRST_PORT, end),
                    worker_id=self._process.orders.process,
                    reason=name,
                    on_lost=on_lost,
                    rng=self._process.rng,
                )
            except PortUnavailable:
                return "refused", {}
            reserved.append(made)
            return "ok", {"keys": [port_key(HOST, port) for port in made.ports]}

        asked = {"reservation": name, "count": count, "first": FIRST_PORT, "end": end}
        await self._process.call("reserve", attempt, **asked)
        return reserved[0] if reserved else None

    async def _release(self, name: str, reservation: PortReservation) -> None:
        keys = [port_key(HOST, port) for port in reservation.ports]

        async def attempt() -> tuple[Outcome, Any]:
            await reservation.release()
            return "ok", {}

        await self._process.call("release", attempt, reservation=name, keys=keys)


class _Member:
    """Takes part in one barrier after the other, all of one id."""

    def __init__(self, process: Process, registry: RedisRegistry) -> None:
        self._process = process
        self._registry = registry

    async def run(self) -> None:
        while not self._process.resting.is_set():
            part = self._process.new_value()
            timeout_s = self._process.rng.uniform(0.2, BARRIER_TIMEOUT_S)
            if self._process.rng.random() < LEADS:
                await self._lead(part, timeout_s)
            else:
                await self._join(part, timeout_s)
            await self._process.pause()

    async def _lead(self, part: str, timeout_s: float) -> None:
        barrier = LeaderBarrier(BARRIER, WORKERS_COUNT, timeout_s)

        async def attempt() -> tuple[Outcome, Any]:
            try:
                return "ok", {"workers": await barrier.sync(self._registry, part)}
            except BarrierError as exc:
                return "refused", {"reason": str(exc)}

        asked = {"barrier": BARRIER, "count": WORKERS_COUNT, "timeout_s": timeout_s}
        await self._process.call("barrier_lead", attempt, part=part, **asked)
        await asyncio.sleep(self._process.rng.uniform(0, STAY_S))
        await self._leave(part, barrier)

    async def _join(self, part: str, timeout_s: float) -> None:
        worker = self._process.rng.choice(WORKERS)
        barrier = WorkerBarrier(BARRIER, worker, timeout_s)

        async def attempt() -> tuple[Outcome, Any]:
            try:
                return "ok", {"data": await barrier.sync(self._registry)}
            except BarrierError as exc:
                return "refused", {"reason": str(exc)}

        asked = {"barrier": BARRIER, "worker": worker, "timeout_s": timeout_s}
        await self._process.call("barrier_join", attempt, part=part, **asked)
        await self._leave(part, barrier)

    async def _leave(self, part: str, barrier: LeaderBarrier | WorkerBarrier) -> None:
        async def attempt() -> tuple[Outcome, Any]:
            await barrier.aclose()
            return "ok", {}

        await self._process.call("barrier_leave", attempt, barrier=BARRIER, part=part)
