"""Port reservations on a real registry."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Awaitable, Callable

import pytest

from dynamo_redis.errors import PortUnavailable
from dynamo_redis.names import PORTS
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.runtime.ports import PortReservation, reserve_ports

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]
HOST = "10.20.56.81"


def free_range(count: int) -> tuple[int, int]:
    """Return a range of ports that are free on this machine now."""
    rng = random.Random()
    while True:
        first = rng.randrange(40000, 60000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first, first + count


async def reserve(
    runtime: DistributedRuntime, count: int, port_range: tuple[int, int], worker_id: str = "w"
) -> PortReservation:
    return await reserve_ports(
        runtime.registry, HOST, count=count, port_range=port_range, worker_id=worker_id, reason="test"
    )


async def test_processes_never_share_a_port(open_runtime: OpenRuntime) -> None:
    one, other = await open_runtime(), await open_runtime()
    port_range = free_range(4)
    held = [await reserve(runtime, 1, port_range) for runtime in (one, other, one, other)]
    assert sorted(port for reservation in held for port in reservation.ports) == list(range(*port_range))
    with pytest.raises(PortUnavailable, match=HOST):
        await reserve(one, 1, port_range)


async def test_consecutive_ports_are_all_or_nothing(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    first, end = free_range(5)
    middle = await reserve(runtime, 1, (first + 2, first + 3))
    with pytest.raises(PortUnavailable, match="3 consecutive"):
        await reserve(runtime, 3, (first, end))
    keys = [record.key for record in (await runtime.registry.get_prefix(PORTS)).records]
    assert keys == [f"{PORTS}{HOST}/{first + 2}"]
    await middle.release()
    async with await reserve(runtime, 5, (first, end)) as reservation:
        assert reservation.ports == tuple(range(first, end))
        assert not reservation.lost
    assert (await runtime.registry.get_prefix(PORTS)).records == ()


async def test_port_in_use_on_this_machine_is_skipped(open_runtime: OpenRuntime) -> None:
    first, end = free_range(2)
    with socket.socket() as busy:
        busy.bind(("", first))
        busy.listen()
        assert (await reserve(await open_runtime(), 1, (first, end))).ports == (first + 1,)


async def test_port_record_has_holder_and_reason(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()
    reservation = await reserve(runtime, 1, free_range(1), worker_id="vllm-backend-dp0")
    record = await runtime.registry.get(f"{PORTS}{HOST}/{reservation.ports[0]}")
    assert record is not None
    stored = json.loads(record.value)
    assert (stored["worker_id"], stored["reason"]) == ("vllm-backend-dp0", "test")
    assert stored["reserved_at"] > 1.7e9


async def test_closed_process_releases_its_ports(open_runtime: OpenRuntime) -> None:
    one, other = await open_runtime(), await open_runtime()
    port_range = free_range(1)
    await reserve(one, 1, port_range)
    await one.aclose()
    assert (await reserve(other, 1, port_range)).ports == (port_range[0],)


async def test_range_that_is_too_small_is_an_error(open_runtime: OpenRuntime) -> None:
    with pytest.raises(PortUnavailable, match="do not fit"):
        await reserve(await open_runtime(), 3, (5000, 5002))
