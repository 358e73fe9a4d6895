"""Reserve ports of a host through the registry, for engines that need fixed or consecutive ones.

Prefer binding port 0 and advertising what came out. Where an engine insists on being told its ports, a
reservation keeps two workers of one host, in containers that share its network, from choosing the same.

A reservation is kept by its process's lease, and ends with it: a process that dies gives its ports back after
`DYN_LEASE_TTL_S`. It is no lock. Two processes can believe for a while that they hold the same port: when
Redis has lost its data and another process reserves before this one has registered again, and when this one
could not reach Redis, or stood still, for longer than its lease lives. The one that is late is told
(`on_lost`) as soon as Redis answers. Who already listens on the port keeps it, since nobody else can bind it;
who does not yet should give the reservation up and make another.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

from pydantic import BaseModel, ConfigDict

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.errors import ConfigError, KeyExists, PortUnavailable
from dynamo_redis.names import port_key
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import LostReason, Registration, Registry

log = logging.getLogger(__name__)

_END_OF_PORTS = 65536
DEFAULT_RANGE = (20000, 30000)

OnPortLost = Callable[[int, LostReason], None]
"""Called on the event loop with a port that is no longer this process's, and why."""


class PortRecord(BaseModel):
    """Who holds a port, and what for. `reserved_at` in seconds since the epoch."""

    model_config = ConfigDict(extra="allow", frozen=True)

    worker_id: str
    reason: str
    reserved_at: float
    pid: int
    version: int = 1


class PortReservation:
    """Ports that are this process's until `release`, the end of `async with`, or of its lease."""

    def __init__(self, host: str, ports: Sequence[int], registrations: Sequence[Registration]) -> None:
        self.host = host
        self.ports = tuple(ports)
        self._registrations = list(registrations)

    @property
    def lost(self) -> bool:
        """Whether one of the ports is known to be no longer this process's."""
        return any(registration.lost for registration in self._registrations)

    async def release(self) -> None:
        """Give the ports back. Idempotent; what Redis cannot be told ends with the lease."""
        registrations, self._registrations = self._registrations, []
        await withdraw(registrations)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.release()


async def reserve_ports(
    registry: Registry,
    host: str,
    *,
    count: int = 1,
    port_range: tuple[int, int] = DEFAULT_RANGE,
    worker_id: str,
    reason: str,
    on_lost: OnPortLost | None = None,
    rng: random.Random | None = None,
) -> PortReservation:
    """Reserve `count` consecutive ports of `host` within `port_range` (first, last + 1).

    A port counts as free if nobody has reserved it and this machine can bind it. Tries start at a random
    place and go round the range once. The ports of a try are reserved one by one: two that want overlapping
    ports at the same moment may both pass them over. Raises ConfigError, PortUnavailable, StoreError; nothing
    stays reserved then, but what Redis could not be told is given back when it is reached again.
    """
    first, end = port_range
    if not 1 <= first < end <= _END_OF_PORTS:
        raise ConfigError(f"port_range {first}-{end - 1} is not within 1-{_END_OF_PORTS - 1}")
    starts = end - first - count + 1
    if count < 1 or starts < 1:
        raise PortUnavailable(f"{count} consecutive ports do not fit into the range {first}-{end - 1}")
    offset = (rng or random.Random()).randrange(starts)  # noqa: S311 - spreads tries, no secret
    record = PortRecord(worker_id=worker_id, reason=reason, reserved_at=SYSTEM_CLOCK.wall(), pid=os.getpid())
    for step in range(starts):
        start = first + (offset + step) % starts
        ports = range(start, start + count)
        if _can_bind(ports):
            reservation = await _reserve(registry, host, ports, record, on_lost)
            if reservation is not None:
                return reservation
    raise PortUnavailable(
        f"no {count} consecutive free port{'s' if count > 1 else ''} of {host} in {first}-{end - 1}"
    )


async def _reserve(
    registry: Registry, host: str, ports: range, record: PortRecord, on_lost: OnPortLost | None
) -> PortReservation | None:
    taken: list[Registration] = []
    try:
        for port in ports:
            registration = await _register(registry, host, port, record, on_lost)
            taken.append(registration)  # at once: a failure gives back those before it
    except KeyExists:
        await PortReservation(host, ports, taken).release()
        return None
    except BaseException:
        await PortReservation(host, ports, taken).release()
        raise
    return PortReservation(host, ports, taken)


async def _register(
    registry: Registry, host: str, port: int, record: PortRecord, on_lost: OnPortLost | None
) -> Registration:
    def lose(why: LostReason) -> None:
        log.error("port %d of %s is no longer reserved by this process: %s", port, host, why)
        if on_lost is not None:
            on_lost(port, why)

    value = record.model_dump_json().encode()
    return await registry.register(port_key(host, port), value, exclusive=True, on_lost=lose)


def _can_bind(ports: range) -> bool:
    with ExitStack() as sockets:
        for port in ports:
            listener = sockets.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                return False
    return True
