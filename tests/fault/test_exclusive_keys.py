"""Port reservations and barriers while Redis, the network and their processes fail."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.child import ChildProcess
from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import BarrierError, PortUnavailable, StoreError, StoreUnavailable
from dynamo_redis.names import PORTS, barrier_prefix, port_key
from dynamo_redis.runtime import barrier
from dynamo_redis.runtime.barrier import LeaderBarrier, WorkerBarrier
from dynamo_redis.runtime.ports import PortReservation, reserve_ports
from dynamo_redis.store.base import LostReason, Registration, Registry
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from faults.proxy import BLACK_HOLE, Conditions, Proxy
from faults.servers import ServerUnderTest, installed_servers
from tests.processes import PROGRAMS

HOST = "10.20.56.81"
DATA = {"master": "10.0.0.1:29500"}
WAIT_S = 45.0

Open = Callable[..., Awaitable[RedisRegistry]]

LEADER = PROGRAMS / "barrier_leader.py"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerUnderTest]:
    """A server that keeps its data."""
    kinds = installed_servers()
    if not kinds:
        pytest.skip("needs a redis-server or valkey-server")
    made = ServerUnderTest("one", kinds[0], tmp_path / "server", persistence="always")
    await made.start()
    yield made
    await made.aclose()


@pytest.fixture
async def proxy(server: ServerUnderTest) -> AsyncIterator[Proxy]:
    async with Proxy(server.url) as made:
        yield made


@pytest.fixture
async def open_registry(server: ServerUnderTest) -> AsyncIterator[Open]:
    opened: list[RedisRegistry] = []

    async def open_(url: str | None = None, *, ttl_s: float = 5.0) -> RedisRegistry:
        """Open a registry; behind a proxy at `url`, with a short time-out.

        Its start is repeated, since this machine alone may take longer than that time-out."""
        settings = StoreSettings.load(
            redis_url=url or server.url, lease_ttl_s=ttl_s, command_timeout_s=0.4 if url else 5.0
        )
        async with asyncio.timeout(WAIT_S):
            while True:
                registry = RedisRegistry(settings)
                opened.append(registry)
                with contextlib.suppress(StoreUnavailable):
                    await registry.start()
                    return registry

    yield open_
    await asyncio.gather(*(registry.aclose() for registry in opened))


async def until(condition: Callable[[], Awaitable[bool]] | Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            holds = condition()
            if holds is True or (not isinstance(holds, bool) and await holds):
                return
            await asyncio.sleep(0.01)


# --------------------------------------------------------------------------- ports


def free_ports(count: int) -> int:
    """Return the first of consecutive ports that are free on this machine, below those that the system gives
    to connections."""
    while True:
        first = random.randrange(20000, 32000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first


async def reserve(registry: Registry, first: int, end: int, count: int = 1, **more: Any) -> PortReservation:
    return await reserve_ports(
        registry, HOST, count=count, port_range=(first, end), worker_id="w", reason="test", **more
    )


async def test_late_process_after_a_wipe_loses_its_port(
    open_registry: Open, server: ServerUnderTest, proxy: Proxy
) -> None:
    first = free_ports(2)
    told: list[tuple[int, LostReason]] = []
    late, other = await open_registry(proxy.url), await open_registry()
    mine = await reserve(
        late, first, first + 2, 2, on_lost=lambda port, why: told.append((port, why)), rng=random.Random(1)
    )
    proxy.conditions = BLACK_HOLE
    await server.execute("FLUSHALL")
    theirs = await reserve(other, first + 1, first + 2)
    proxy.heal()
    await until(lambda: mine.lost)
    assert told == [(first + 1, "conflict")]
    assert not theirs.lost
    await mine.release()
    record = await other.get(port_key(HOST, first + 1))
    assert record is not None
    assert record.lease == other.lease_id
    await until(lambda: is_free(other, first))


async def is_free(registry: Registry, port: int) -> bool:
    return await registry.get(port_key(HOST, port)) is None


async def test_redis_lost_during_a_range_leaves_no_port_reserved(open_registry: Open, proxy: Proxy) -> None:
    """The third of six ports is reserved, but the answer is lost."""
    first = free_ports(6)
    registry, other = await open_registry(proxy.url), await open_registry()
    breaking = BreaksAt(registry, 3, proxy)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(StoreUnavailable):
        await reserve(breaking, first, first + 6, 6)
    assert loop.time() - began < WAIT_S
    assert len((await other.get_prefix(PORTS)).records) == 3
    proxy.heal()

    async def all_free() -> bool:
        return not (await other.get_prefix(PORTS)).records

    await until(all_free)
    async with await reserve(other, first, first + 6, 6) as reservation:
        assert len(reservation.ports) == 6


class BreaksAt:
    """A registry that loses the answers from a certain registration on."""

    def __init__(self, registry: Registry, number: int, proxy: Proxy) -> None:
        self._registry = registry
        self._left = number
        self._proxy = proxy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    async def register(self, *arguments: Any, **more: Any) -> Registration:
        self._left -= 1
        if not self._left:
            self._proxy.conditions = Conditions(swallow_answers=True)
        return await self._registry.register(*arguments, **more)


class Tenant:
    """Reserves and releases ranges. `held` are the ports that all tenants believe to hold."""

    def __init__(
        self, registry: Registry, ports: tuple[int, int], held: dict[int, Tenant], seed: int
    ) -> None:
        self.reservations = 0
        self._registry = registry
        self._range = ports
        self._held = held
        self._rng = random.Random(seed)

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                mine = await reserve(
                    self._registry, *self._range, self._rng.randint(1, 3), rng=self._rng, on_lost=self._lose
                )
            except (PortUnavailable, StoreError):
                await asyncio.sleep(0.02)
                continue
            self.reservations += 1
            for port in mine.ports:
                assert port not in self._held, f"port {port} has two tenants"
                self._held[port] = self
            await asyncio.sleep(self._rng.random() / 20)
            for port in mine.ports:
                assert self._held.pop(port) is self
            await mine.release()

    def _lose(self, port: int, why: LostReason) -> None:
        raise AssertionError(f"port {port} was lost: {why}")


async def test_no_port_ever_has_two_tenants(open_registry: Open, server: ServerUnderTest) -> None:
    """All faults are shorter than a lease, and Redis keeps its data."""
    first = free_ports(8)
    held: dict[int, Tenant] = {}
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(server.url)) for _ in range(4)]
        tenants = [
            Tenant(await open_registry(proxy.url), (first, first + 8), held, seed)
            for seed, proxy in enumerate(proxies)
        ]
        running = [asyncio.create_task(tenant.run(stop)) for tenant in tenants]
        try:
            await disturb(server, proxies, random.Random(20260101))
            await until(
                lambda: all(
                    task.done() or tenant.reservations > 3
                    for task, tenant in zip(running, tenants, strict=True)
                )
            )
        finally:
            stop.set()
            outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert outcomes == [None] * len(tenants)


async def disturb(server: ServerUnderTest, proxies: Sequence[Proxy], rng: random.Random) -> None:
    """Ten faults, one after the other; the middle one kills Redis."""
    for step in range(10):
        proxy = rng.choice(proxies)
        match rng.randrange(4):
            case 0:
                proxy.cut()
            case 1:
                proxy.conditions = Conditions(swallow_answers=True)
            case 2:
                proxy.conditions = BLACK_HOLE
            case _:
                server.freeze()
        await asyncio.sleep(0.12)
        server.thaw()
        proxy.heal()
        if step == 5:
            await server.kill()
            await server.start()


# --------------------------------------------------------------------------- barriers


async def counted(registry: Registry, count: int, barrier_id: str = "group") -> None:
    """Wait until the barrier has that many workers."""

    async def are_there() -> bool:
        return len((await registry.get_prefix(f"{barrier_prefix(barrier_id)}workers/")).records) == count

    await until(are_there)


async def test_wipe_only_delays_a_barrier(open_registry: Open, server: ServerUnderTest) -> None:
    leader, one, two, three = [await open_registry() for _ in range(4)]
    leading = asyncio.create_task(LeaderBarrier("group", 3, 20).sync(leader, DATA))
    waiting = [
        asyncio.create_task(WorkerBarrier("group", name, 20).sync(registry))
        for name, registry in (("one", one), ("two", two))
    ]
    await counted(three, 2)
    await server.execute("FLUSHALL")
    await asyncio.sleep(0.2)
    assert await WorkerBarrier("group", "three", 20).sync(three) == DATA
    assert await asyncio.gather(*waiting) == [DATA, DATA]
    assert await leading == ["one", "three", "two"]


async def test_worker_of_a_leader_lost_with_the_data_is_freed(
    open_registry: Open, server: ServerUnderTest, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(barrier, "GRACE_S", 0.2)
    leader, worker = await open_registry(proxy.url), await open_registry(ttl_s=1)
    leading = asyncio.create_task(LeaderBarrier("group", 2, 60).sync(leader, DATA))
    waiting = asyncio.create_task(WorkerBarrier("group", "one").sync(worker))
    await counted(worker, 1)
    proxy.conditions = BLACK_HOLE
    await server.execute("FLUSHALL")
    await worker.put("a write", b"shows the loss at once")
    with pytest.raises(BarrierError, match="the leader is gone"):
        await asyncio.wait_for(waiting, WAIT_S)
    proxy.heal()
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)


async def test_killed_leader_frees_its_workers_for_the_next_leader(
    open_registry: Open, server: ServerUnderTest
) -> None:
    """The next leader starts while the dead leader's lease lives.

    It waits also for the end of a dead worker. A worker that dies in another barrier is no longer counted
    there."""
    expiring = asyncio.create_task(a_worker_whose_lease_ends_is_counted_no_more(open_registry))
    child = ChildProcess.start([sys.executable, LEADER, server.url])
    dying = await open_registry(ttl_s=1)
    next_leader, worker, reborn = [await open_registry() for _ in range(3)]
    waiting = asyncio.create_task(WorkerBarrier("group", "one", 30).sync(worker))
    doomed = asyncio.create_task(WorkerBarrier("group", "two", 30).sync(dying))
    await counted(worker, 2)
    child.kill()
    await abandon(dying, doomed)
    leading = asyncio.create_task(LeaderBarrier("group", 2, 30).sync(next_leader, DATA))
    with pytest.raises(BarrierError, match=r"the leader is gone"):
        await waiting
    joining = [
        asyncio.create_task(WorkerBarrier("group", name, 30).sync(registry))
        for name, registry in (("one", worker), ("two", reborn))
    ]
    for task in joining:
        assert await task == DATA
    assert await leading == ["one", "two"]
    await child.stop(1)
    await expiring


async def a_worker_whose_lease_ends_is_counted_no_more(open_registry: Open) -> None:
    dying = await open_registry(ttl_s=1)
    leader, one, two = [await open_registry() for _ in range(3)]
    leading = asyncio.create_task(LeaderBarrier("other", 2, 30).sync(leader, DATA))
    doomed = asyncio.create_task(WorkerBarrier("other", "dead", 30).sync(dying))
    await counted(leader, 1, "other")
    await abandon(dying, doomed)
    await counted(leader, 0, "other")
    await asyncio.gather(*(WorkerBarrier("other", n, 30).sync(r) for n, r in (("one", one), ("two", two))))
    assert await leading == ["one", "two"]


async def abandon(registry: RedisRegistry, task: asyncio.Task[Any]) -> None:
    """End a process as kill -9 does: its lease is not renewed, and its keys are not deleted."""
    await registry._keepalive.aclose()
    await registry._registrations.aclose()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_redis_killed_in_the_middle_is_outwaited_by_both_sides(
    open_registry: Open, server: ServerUnderTest
) -> None:
    leader, one, two = [await open_registry() for _ in range(3)]
    await one.put("warm", b"up")
    await server.kill()
    leading = asyncio.create_task(LeaderBarrier("group", 2, 20).sync(leader, DATA))
    first = asyncio.create_task(WorkerBarrier("group", "one", 20).sync(one))
    await asyncio.sleep(0.7)
    assert not leading.done()
    await server.start()
    await counted(two, 1)
    assert await WorkerBarrier("group", "two", 20).sync(two) == DATA
    assert await first == DATA
    assert await leading == ["one", "two"]


async def test_abort_without_redis_is_written_later(open_registry: Open, server: ServerUnderTest) -> None:
    leader, worker = [await open_registry() for _ in range(2)]
    leading = asyncio.create_task(LeaderBarrier("group", 2, 0.3).sync(leader, DATA))
    waiting = asyncio.create_task(WorkerBarrier("group", "one", 20).sync(worker))
    await counted(worker, 1)
    await server.kill()
    with pytest.raises(BarrierError, match="1 of 2 workers"):
        await leading
    await server.start()
    with pytest.raises(BarrierError, match=r"gone|aborted"):
        await waiting


async def test_late_worker_learns_the_barriers_end(open_registry: Open) -> None:
    leader, one, two = [await open_registry() for _ in range(3)]
    async with LeaderBarrier("group", 1, 10) as complete:
        syncing = asyncio.create_task(complete.sync(leader, DATA))
        assert await WorkerBarrier("group", "one", 10).sync(one) == DATA
        assert await syncing == ["one"]
        with pytest.raises(BarrierError, match="complete before 'two'"):
            await WorkerBarrier("group", "two", 10).sync(two)
    await one.aclose()
    async with LeaderBarrier("group", 1, 0.1) as aborted:
        with pytest.raises(BarrierError, match="0 of 1"):
            await aborted.sync(leader, DATA)
        with pytest.raises(BarrierError, match=r"aborted: .*0 of 1"):
            await WorkerBarrier("group", "two", 10).sync(two)


async def test_surplus_worker_is_refused(open_registry: Open) -> None:
    leader, one, two = [await open_registry() for _ in range(3)]
    workers = [
        asyncio.create_task(WorkerBarrier("group", name, 10).sync(registry))
        for name, registry in (("one", one), ("two", two))
    ]
    await asyncio.sleep(0.05)
    (counted_id,) = await LeaderBarrier("group", 1, 10).sync(leader, DATA)
    outcomes = await asyncio.gather(*workers, return_exceptions=True)
    assert outcomes.count(DATA) == 1
    assert outcomes[("one", "two").index(counted_id)] == DATA
    assert any(isinstance(outcome, BarrierError) for outcome in outcomes)


async def test_replacement_of_a_counted_worker_is_not_admitted(open_registry: Open) -> None:
    """It waits while another worker with its id is counted, goes on and leaves."""
    leader, one, two, late = [await open_registry() for _ in range(4)]
    async with LeaderBarrier("group", 2, 10) as leading:
        syncing = asyncio.create_task(leading.sync(leader, DATA))
        first, second = WorkerBarrier("group", "one", 10), WorkerBarrier("group", "one", 10)
        counting = asyncio.create_task(first.sync(one))
        await counted(two, 1)
        outwaiting = asyncio.create_task(second.sync(late))
        await asyncio.sleep(0.05)
        assert await WorkerBarrier("group", "two", 10).sync(two) == DATA
        assert await counting == DATA
        assert await syncing == ["one", "two"]
        await first.aclose()
        with pytest.raises(BarrierError, match="complete without 'one'"):
            await outwaiting


async def test_keys_of_an_earlier_round_are_not_counted(open_registry: Open) -> None:
    leader, one, two = [await open_registry() for _ in range(3)]
    old = LeaderBarrier("group", 1, 10)
    left_behind = WorkerBarrier("group", "one", 10)
    await asyncio.gather(old.sync(leader, "old"), left_behind.sync(one))
    await old.aclose()
    leading = asyncio.create_task(LeaderBarrier("group", 1, 10).sync(leader, DATA))
    assert await WorkerBarrier("group", "two", 10).sync(two) == DATA
    assert await leading == ["two"]


async def test_worker_removed_from_a_barrier_gets_an_error(open_registry: Open) -> None:
    leader, worker, other = [await open_registry() for _ in range(3)]
    prefix = barrier_prefix("group")
    leading = asyncio.create_task(LeaderBarrier("group", 2, 30).sync(leader, DATA))
    waiting = asyncio.create_task(WorkerBarrier("group", "one", 30).sync(worker))
    await counted(other, 1)
    await other.delete(f"{prefix}workers/one")
    with pytest.raises(BarrierError, match="'one' was taken out"):
        await waiting
    await other.delete(f"{prefix}data")
    with pytest.raises(BarrierError, match="deleted"):
        await leading


async def test_later_of_two_leaders_after_a_wipe_is_refused(
    open_registry: Open, server: ServerUnderTest, proxy: Proxy
) -> None:
    late, early, one, two = await open_registry(proxy.url), *[await open_registry() for _ in range(3)]
    leading = asyncio.create_task(LeaderBarrier("group", 2, 30).sync(late, "of the late one"))
    waiting = asyncio.create_task(WorkerBarrier("group", "one", 30).sync(one))
    await counted(two, 1)
    proxy.conditions = BLACK_HOLE
    await server.execute("FLUSHALL")
    succeeding = asyncio.create_task(LeaderBarrier("group", 1, 30).sync(early, DATA))
    with pytest.raises(BarrierError, match="another has begun"):
        await waiting
    proxy.heal()
    with pytest.raises(BarrierError, match="another leader has taken its place"):
        await leading
    assert await WorkerBarrier("group", "two", 30).sync(two) == DATA
    assert await succeeding == ["two"]
