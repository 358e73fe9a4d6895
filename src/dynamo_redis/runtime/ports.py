"""Reservations of a host's ports through the registry, for engines that need fixed or consecutive ports.

If you can, bind port 0 and advertise the port that the kernel chose. If an engine has to be given its ports,
a reservation keeps two workers of one host, as in containers that share its network, from choosing the same.

A reservation lives and ends with its process's lease: the ports of a process that died are free after
`DYN_LEASE_TTL_S`. It is no lock. Two processes can hold the same port for a while in two cases: Redis has
lost its data, and another process reserves the port before this one has registered again; or this process did
not reach Redis, or did not run, for longer than its lease's TTL. The process that lost the port is notified
by `on_lost` as soon as Redis answers. If it already listens on the port, it can keep it, since no other
process can bind it. Otherwise it should release the reservation and make a new one.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
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
"""Called on the event loop with a port whose reservation was lost, and the reason."""


class PortRecord(BaseModel):
    """The holder of a port, its reason, and `reserved_at` in seconds since the epoch."""

    model_config = ConfigDict(extra="allow", frozen=True)

    worker_id: str
    reason: str
    reserved_at: float
    pid: int
    version: int = 1


class PortReservation:
    """Ports that this process holds until `release`, the end of `async with`, or the end of its lease."""

    def __init__(self, host: str, ports: Sequence[int], registrations: Sequence[Registration]) -> None:
        self.host = host
        self.ports = tuple(ports)
        self._registrations = list(registrations)

    @property
    def lost(self) -> bool:
        """True if the reservation of one of the ports is known to be lost."""
        return any(registration.lost for registration in self._registrations)

    async def release(self) -> None:
        """Release the ports. Idempotent. If Redis does not answer, they are released with the lease."""
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

    A port is free if it is not reserved and this machine can bind it. The search starts at a random port and
    goes once through the range. The ports of a try are reserved one by one: two processes that try
    overlapping ports at the same moment may both skip them.

    Raises ConfigError, PortUnavailable, StoreError. Nothing stays reserved then; if Redis does not answer,
    the ports are released as soon as it does.

    Args:
        host: the name under which all workers of this machine reserve.
        count: the number of consecutive ports.
        port_range: the first port and the last + 1.
        worker_id, reason: stored with each port, for people who read the registry.
        on_lost: called when a port's reservation is lost.
        rng: the source of the random start.
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
        reservation = await _reserve(registry, host, ports, record, on_lost)
        if reservation is not None:
            return reservation
    raise PortUnavailable(
        f"no {count} consecutive free port{'s' if count > 1 else ''} of {host} in {first}-{end - 1}"
    )


async def _reserve(
    registry: Registry, host: str, ports: range, record: PortRecord, on_lost: OnPortLost | None
) -> PortReservation | None:
    """Reserve these ports.

    Returns None if this machine cannot bind all of them now, or if one is reserved; then, as after an error,
    none stays reserved.
    """
    with ExitStack() as sockets:
        for port in ports:
            listener = sockets.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                return None

    def report_lost(port: int, why: LostReason) -> None:
        log.error("port %d of %s is no longer reserved by this process: %s", port, host, why)
        if on_lost is not None:
            on_lost(port, why)

    value = record.model_dump_json().encode()
    taken: list[Registration] = []
    try:
        for port in ports:
            key, lost = port_key(host, port), partial(report_lost, port)
            taken.append(await registry.register(key, value, exclusive=True, on_lost=lost))
    except KeyExists:
        await PortReservation(host, ports, taken).release()
        return None
    except BaseException:
        await PortReservation(host, ports, taken).release()
        raise
    return PortReservation(host, ports, taken)
