"""Negative controls: each fails its oracle, where the product passes the very same scenario.

A protection that no test misses is worth nothing, and an oracle that never fails finds nothing. So each test
here has two halves: a scenario, played by a variant without one protection (`faults/controls/`), which the
oracle must catch, and by the product, which it must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import cache
from pathlib import Path
from typing import Self

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import KeyExists, LockLost, PortUnavailable
from dynamo_redis.names import port_key
from dynamo_redis.runtime.ports import reserve_ports
from dynamo_redis.store.base import Put, Watch, WatchBatch
from dynamo_redis.store.keys import RegistryKeys, format_lease
from dynamo_redis.store.locks.redis_locks import RedisLocks
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.operations import KeyOperations
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.registry.scripts_api import KeyValue
from faults.controls.chains import agreeable_registry
from faults.controls.locks import PlainLocks
from faults.controls.ports import TolerantRegistry
from faults.controls.retries import RetryingClient
from faults.controls.watches import CounterClient, CounterWatch, NaiveWatch
from faults.history import History, Recorder
from faults.observer import Observer
from faults.oracles import ORACLES
from faults.proxy import STALL, Conditions, Proxy
from faults.rewind import Rewind
from faults.servers import ServerKind, ServerUnderTest, final_state, installed_servers

PREFIX = "controls"
WAIT_S = 30.0
TTL_S = 1.0
TIMEOUT_S = 2.0
LOCK_TTL_S = 0.3


@cache
def server_kind() -> ServerKind:
    kinds = installed_servers()
    if not kinds:
        pytest.skip("needs a Redis or Valkey")
    return kinds[0]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.005)


class Stage:
    """A server, a proxy in front of it, an observer behind it, and the history of a scenario."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.server = ServerUnderTest("a", server_kind(), directory / "server", persistence="none")
        self.proxy = Proxy("")
        self._directory = directory
        self._recorders: dict[str, Recorder] = {}
        self._observer = Observer(self.recorder("observer"), PREFIX)

    def recorder(self, process: str) -> Recorder:
        """Return the recorder of one process, by name."""
        if process not in self._recorders:
            self._recorders[process] = Recorder(self._directory, process)
        return self._recorders[process]

    async def __aenter__(self) -> Self:
        await self.server.start()
        self.proxy.target = self.server.url
        await self.proxy.start()
        self._observer.follow(self.server)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._observer.aclose()
        await self.proxy.aclose()
        await self.server.aclose()
        for recorder in self._recorders.values():
            recorder.close()

    async def records(self) -> dict[str, list[str | None]]:
        """Return the registry's records: key → value, lease, revision."""
        records: dict[str, list[str | None]] = (await final_state(self.server, PREFIX))["records"]
        return records

    @contextlib.asynccontextmanager
    async def fault(self, name: str, loses: str) -> AsyncIterator[None]:
        """Read the log, then destroy, and note both."""
        await self._observer.catch_up(self.server)
        runner = self.recorder("runner")
        runner.note("fault", name=name)
        runner.note("loses", what=loses)
        yield
        runner.note("healed", name=name)

    async def judged_by(self, oracle: str) -> list[str]:
        """Read the final state, and return the oracle's findings."""
        await self._observer.catch_up(self.server)
        self.recorder("runner").note("state", server="a", **await final_state(self.server, PREFIX))
        return [str(violation) for violation in ORACLES[oracle](History.read(self._directory))]


@pytest.fixture
async def stages(tmp_path: Path) -> AsyncIterator[tuple[Stage, Stage]]:
    """Yield a stage for the control and one for the product."""
    async with Stage(tmp_path / "control") as control, Stage(tmp_path / "product") as product:
        yield control, product


def settings_of(stage: Stage, url: str | None = None) -> StoreSettings:
    return StoreSettings.load(
        redis_url=url or stage.proxy.url, prefix=PREFIX, lease_ttl_s=TTL_S, command_timeout_s=TIMEOUT_S
    )


def key_value(url: str, client: type[RedisClient] = RedisClient) -> KeyValue:
    return KeyValue(client(url, timeout_s=TIMEOUT_S), RegistryKeys(PREFIX))


# ---------------------------------------------------------------------- watches


class Shown:
    """Follows a watch, notes its events, and keeps the state that they make."""

    def __init__(self, watch: AsyncIterable[WatchBatch], recorder: Recorder) -> None:
        self.state: dict[str, str] = {}
        self._recorder = recorder
        self._task = asyncio.create_task(self._follow(watch))

    async def _follow(self, watch: AsyncIterable[WatchBatch]) -> None:
        async for batch in watch:
            events: list[list[str]] = []
            for event in batch.events:
                if isinstance(event, Put):
                    record = event.record
                    events.append(["put", record.key, record.value.decode(), record.mod_revision])
                    self.state[record.key] = record.value.decode()
                else:
                    events.append(["delete", event.key, event.revision, event.cause])
                    self.state.pop(event.key, None)
            self._recorder.note(
                "watch",
                watch="w/1",
                prefix="data/",
                revision=batch.revision,
                resync=batch.resync,
                events=events,
            )

    async def until(self, key: str) -> None:
        async def is_shown() -> bool:
            assert not self._task.done(), self._task
            return key in self.state

        await until(is_shown)

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


OpenWatch = Callable[[Stage], AbstractAsyncContextManager[AsyncIterable[WatchBatch]]]
WatchFault = Callable[[Stage, KeyOperations, Shown], Awaitable[None]]


@contextlib.asynccontextmanager
async def naive_watch(stage: Stage) -> AsyncIterator[NaiveWatch]:
    async with _small_watch(NaiveWatch(key_value(stage.proxy.url), "data/")) as watch:
        yield watch


@contextlib.asynccontextmanager
async def counter_watch(stage: Stage) -> AsyncIterator[NaiveWatch]:
    async with _small_watch(CounterWatch(key_value(stage.proxy.url, CounterClient), "data/")) as watch:
        yield watch


@contextlib.asynccontextmanager
async def _small_watch(watch: NaiveWatch) -> AsyncIterator[NaiveWatch]:
    try:
        yield watch
    finally:
        await watch.aclose()


@contextlib.asynccontextmanager
async def product_watch(stage: Stage) -> AsyncIterator[Watch]:
    registry = RedisRegistry(settings_of(stage))
    await registry.start()
    try:
        yield registry.watch("data/")
    finally:
        await registry.aclose()


async def play_watch(
    stage: Stage, open_watch: OpenWatch, fault: WatchFault, client: type[RedisClient] = RedisClient
) -> list[str]:
    """Write a key and see it; cause the fault; write another key and see it."""
    kv = key_value(stage.server.url, client)
    writer = KeyOperations(kv)
    async with contextlib.aclosing(kv.client), open_watch(stage) as watch:
        await writer.put("data/begin", b"begin")
        async with contextlib.aclosing(Shown(watch, stage.recorder("watcher"))) as shown:
            await shown.until("data/begin")
            await fault(stage, writer, shown)
            await writer.put("data/end", b"end")
            await shown.until("data/end")
            return await stage.judged_by("watch")


async def trim(stage: Stage, writer: KeyOperations, shown: Shown) -> None:
    """Trim the log past a watcher that is cut off."""
    stage.proxy.refuse = True
    stage.proxy.cut()
    await writer.put("data/1", b"unseen")
    await writer.put("data/2", b"unseen")
    async with stage.fault("trim", "log"):
        await stage.server.execute("XTRIM", RegistryKeys(PREFIX).log, "MAXLEN", 1)
    stage.proxy.heal()


async def wipe(stage: Stage, writer: KeyOperations, shown: Shown) -> None:
    """Delete all data, and break no connection."""
    async with stage.fault("wipe", "data"):
        await stage.server.execute("FLUSHALL")


async def nothing(stage: Stage, writer: KeyOperations, shown: Shown) -> None:
    """Do nothing: without a fault a control has to pass. Otherwise its failure would prove nothing."""


async def fail_over(stage: Stage, writer: KeyOperations, shown: Shown) -> None:
    """Let the server go on from before a write that was acknowledged and seen; other writes take its
    place."""
    rewind = await Rewind.capture(stage.server, PREFIX)
    await writer.put("data/1", b"lost")
    await shown.until("data/1")
    async with stage.fault("failover", "tail"):
        await rewind.undo_since()
        stage.proxy.cut()
    await writer.put("data/2", b"written in its place")
    await writer.put("data/3", b"and behind it")


@pytest.mark.parametrize("fault", [trim, wipe, fail_over])
async def test_naive_watch_is_caught(stages: tuple[Stage, Stage], fault: WatchFault) -> None:
    control, product = stages
    assert await play_watch(control, naive_watch, fault) != []
    assert await play_watch(product, product_watch, fault) == []


async def test_revisions_from_a_counter_are_caught(stages: tuple[Stage, Stage]) -> None:
    control, product = stages
    found = await play_watch(control, counter_watch, fail_over, CounterClient)
    assert any("data/2" in violation for violation in found), found  # an event that never came
    assert await play_watch(product, product_watch, fail_over) == []


async def test_watches_are_right_without_a_fault(stages: tuple[Stage, Stage]) -> None:
    one, other = stages
    assert await play_watch(one, naive_watch, nothing) == []
    assert await play_watch(other, counter_watch, nothing, CounterClient) == []


# ---------------------------------------------------------------------- registered keys


async def play_worker(
    stage: Stage, open_registry: Callable[[StoreSettings], RedisRegistry], *, is_lossy: bool = True
) -> list[str]:
    """Register two keys of a worker; a failover loses the second."""
    async with contextlib.aclosing(open_registry(settings_of(stage))) as registry:
        await registry.start()
        return await _register_and_fail_over(stage, registry, is_lossy)


async def _register_and_fail_over(stage: Stage, registry: RedisRegistry, is_lossy: bool) -> list[str]:
    worker = stage.recorder("worker")
    worker.note("started", role="worker", lease=format_lease(registry.lease_id))
    told_lost = asyncio.Event()

    async def register(key: str) -> None:
        call = worker.begin("register", key=key, value=key, exclusive=False)

        def on_lost(reason: str) -> None:
            worker.note("lost", key=key, reason=reason)
            told_lost.set()

        await registry.register(key, key.encode(), on_lost=on_lost)
        worker.end(call, "ok", {})

    await register("instances/kept")
    rewind = await Rewind.capture(stage.server, PREFIX)
    await register("instances/lost")
    async with stage.fault("failover", "tail"):
        if is_lossy:
            await rewind.undo_since()
        stage.proxy.cut()

    async def is_settled() -> bool:
        return told_lost.is_set() or "instances/lost" in await stage.records()

    await until(is_settled)
    return await stage.judged_by("keys")


async def test_registry_without_a_writer_chain_is_caught(stages: tuple[Stage, Stage]) -> None:
    control, product = stages
    found = await play_worker(control, agreeable_registry)
    assert any("instances/lost" in violation for violation in found), found
    assert await play_worker(product, RedisRegistry) == []


async def test_writer_chain_is_not_needed_without_a_loss(stages: tuple[Stage, Stage]) -> None:
    assert await play_worker(stages[0], agreeable_registry, is_lossy=False) == []


# ---------------------------------------------------------------------- retries


async def play_create(stage: Stage, client: type[RedisClient], *, loses_answer: bool = True) -> list[str]:
    """Create a key; the connection breaks after the write and before the answer."""
    kv = key_value(stage.proxy.url, client)
    operations, caller = KeyOperations(kv), stage.recorder("caller")
    await operations.put("warm", b"up")
    stage.proxy.conditions = Conditions(swallow_answers=loses_answer)
    call = caller.begin("create", key="data/1", value="mine")
    creating = asyncio.create_task(operations.create("data/1", b"mine"))

    async def is_done() -> bool:  # and its answer is no longer under way
        return "data/1" in await stage.records() and stage.proxy.has_swallowed is loses_answer

    await until(is_done)
    stage.proxy.heal()
    try:
        caller.end(call, "ok", {"revision": await creating})
    except KeyExists:
        caller.end(call, "refused", {"exists": True})
    await kv.client.aclose()
    return await stage.judged_by("linear")


async def test_unmarked_retries_are_caught(stages: tuple[Stage, Stage]) -> None:
    control, product = stages
    assert await play_create(control, RetryingClient) != []
    assert await play_create(product, RedisClient) == []


async def test_retries_do_no_harm_without_lost_answers(stages: tuple[Stage, Stage]) -> None:
    assert await play_create(stages[0], RetryingClient, loses_answer=False) == []


# ---------------------------------------------------------------------- locks

Locks = PlainLocks | RedisLocks


def product_locks(url: str) -> RedisLocks:
    return RedisLocks(RedisClient(url, timeout_s=TIMEOUT_S), PREFIX)


def plain_locks(url: str) -> PlainLocks:
    return PlainLocks(url, PREFIX)


class Stop:
    """The point at which a holder's whole process stops until it may go on."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.goes_on = threading.Event()

    def here(self) -> None:
        self.stopped.set()
        assert self.goes_on.wait(WAIT_S)


async def hold_and_write(locks: Locks, recorder: Recorder, values: list[str], stop: Stop | None) -> None:
    """Take the lock, and write each value; with a stop, before the last."""
    call = recorder.begin("lock_acquire", lock="l")
    with contextlib.suppress(LockLost):
        async with locks.lock("l", ttl_s=LOCK_TTL_S).hold(timeout_s=WAIT_S) as held:
            recorder.end(call, "ok", {"token": held.fencing_token})
            for value in values:
                if stop is not None and value is values[-1]:
                    stop.here()
                call = recorder.begin("lock_write", lock="l", token=held.fencing_token, value=value)
                try:
                    await held.write(value.encode())
                    recorder.end(call, "ok", {})
                except LockLost:
                    recorder.end(call, "refused", {})


async def play_lock(stage: Stage, open_locks: Callable[[str], Locks], *, stops: bool = True) -> list[str]:
    """Stop a holder past its TTL; another takes over and writes; the first goes on, and writes."""
    stop = Stop()
    if not stops:
        stop.goes_on.set()

    async def first() -> None:
        locks = open_locks(stage.server.url)
        await hold_and_write(locks, stage.recorder("first"), ["early", "stale"], stop)
        await locks.aclose()

    # An event loop and a thread of its own: stopping it also stops the renewal of its lock.
    holder = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(first())))
    await asyncio.to_thread(stop.stopped.wait, WAIT_S)
    locks = open_locks(stage.server.url)
    try:
        await hold_and_write(locks, stage.recorder("second"), ["new"], None)
    finally:
        stop.goes_on.set()
        await holder
    call = stage.recorder("second").begin("lock_read", lock="l")
    seen = await locks.lock("l", ttl_s=LOCK_TTL_S).read()
    assert seen is not None
    answer = {"value": seen.value.decode(), "token": seen.fencing_token}
    stage.recorder("second").end(call, "ok", answer)
    await locks.aclose()
    return await stage.judged_by("lock")


async def test_lock_without_fencing_is_caught(stages: tuple[Stage, Stage]) -> None:
    control, product = stages
    found = await play_lock(control, plain_locks)
    assert any("first wrote as holder after second" in violation for violation in found), found
    assert await play_lock(product, product_locks) == []


async def test_plain_lock_is_right_while_no_holder_stops(stages: tuple[Stage, Stage]) -> None:
    assert await play_lock(stages[0], plain_locks, stops=False) == []


# ---------------------------------------------------------------------- ports

HOST = "tenement"
PORT = 29450


async def reserve(registry: RedisRegistry, recorder: Recorder, name: str, port: int) -> bool:
    """Reserve a port as the tenant of that name, and note reports of its loss."""

    def on_lost(port: int, reason: str) -> None:
        recorder.note("lost", key=port_key(HOST, port), reason=reason, reservation=name)

    call = recorder.begin("reserve", reservation=name, count=1, first=port, end=port + 1)
    try:
        made = await reserve_ports(
            registry,
            HOST,
            port_range=(port, port + 1),
            worker_id=name,
            reason="a control",
            on_lost=on_lost,
        )
    except PortUnavailable:
        recorder.end(call, "refused", {})
        return False
    recorder.end(call, "ok", {"keys": [port_key(HOST, port) for port in made.ports]})
    return True


async def play_tenants(
    stage: Stage, open_registry: Callable[[StoreSettings], RedisRegistry], *, is_shared: bool = True
) -> list[str]:
    """Let two tenants reserve one port; the first of them cannot reach Redis just then."""
    async with contextlib.AsyncExitStack() as stack:
        registries = {}
        for name, url in (("first", stage.proxy.url), ("second", stage.server.url)):
            registry = open_registry(settings_of(stage, url))
            await stack.enter_async_context(contextlib.aclosing(registry))
            await registry.start()
            stage.recorder(name).note("started", role="tenant", lease=format_lease(registry.lease_id))
            registries[name] = registry
        assert await reserve(registries["first"], stage.recorder("first"), "first", PORT)
        stage.proxy.conditions = STALL
        wanted = PORT if is_shared else PORT + 1
        await reserve(registries["second"], stage.recorder("second"), "second", wanted)
        stage.proxy.heal()
        return await stage.judged_by("exclusive")


async def test_ports_without_a_claim_are_caught(stages: tuple[Stage, Stage]) -> None:
    control, product = stages
    found = await play_tenants(control, TolerantRegistry)
    assert any("was second's while it was first's" in violation for violation in found), found
    assert await play_tenants(product, RedisRegistry) == []


async def test_ports_of_different_tenants_need_no_claim(
    stages: tuple[Stage, Stage],
) -> None:
    assert await play_tenants(stages[0], TolerantRegistry, is_shared=False) == []
