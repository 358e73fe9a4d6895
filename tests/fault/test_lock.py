"""Locks with stopped holders, frozen servers, lost data, stepping clocks and lost answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from dynamo_redis.errors import LockLost, LockNotAcquired, StoreUnavailable
from dynamo_redis.store.base import HeldLock, Lock
from dynamo_redis.store.keys import LockKeys
from dynamo_redis.store.locks.redis_locks import RedisLocks, RedisLockStorage
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from faults.proxy import BLACK_HOLE, Conditions, Proxy
from faults.servers import ServerUnderTest, faketime_library, installed_servers
from tests.processes import PROGRAMS

WAIT_S = 20.0
LONG_S = 30.0
NO_ANSWERS = Conditions(swallow_answers=True)

OpenLocks = Callable[..., RedisLocks]


@pytest.fixture
async def open_locks(dynamo_redis_prefix: str) -> AsyncIterator[OpenLocks]:
    """Opens the locks of the test's prefix, as another process would."""
    opened: list[RedisLocks] = []

    def open_one(url: str, timeout_s: float = 3.0) -> RedisLocks:
        opened.append(RedisLocks(RedisClient(url, timeout_s=timeout_s), dynamo_redis_prefix))
        return opened[-1]

    yield open_one
    for locks in opened:
        await locks.aclose()


@pytest.fixture
async def proxy(own_redis_server: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with Proxy(own_redis_server.url) as proxy:
        yield proxy


@contextlib.contextmanager
def is_lost(saying: str | None = None) -> Iterator[None]:
    with pytest.raises(LockLost, match=saying):
        yield


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.005)


async def value_of(lock: Lock) -> bytes | None:
    stored = await lock.read()
    return None if stored is None else stored.value


# --------------------------------------------------------------------------- holders that stop

HOLDER = PROGRAMS / "lock_holder.py"


async def test_holder_stopped_past_its_ttl_is_cancelled(
    own_redis_server: EmbeddedServer, open_locks: OpenLocks, dynamo_redis_prefix: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(HOLDER, own_redis_server.url, dynamo_redis_prefix),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT_S):
            token = int(await process.stdout.readline())
            os.kill(process.pid, signal.SIGSTOP)
            lock = open_locks(own_redis_server.url).lock("a")
            async with lock.hold(timeout_s=WAIT_S) as held:
                assert held.fencing_token > token
                await held.write(b"new")
                os.kill(process.pid, signal.SIGCONT)
                words = (await process.stdout.read()).decode().split()
                assert await value_of(lock) == b"new"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert words in (["refused", "cancelled", "lost"], ["cancelled", "lost"])


# --------------------------------------------------------------------------- servers that are away


async def hold_until_lost(lock: Lock, entered: asyncio.Event) -> float:
    """Hold the lock as long as possible; return the (monotonic) time of the block's cancellation."""
    with is_lost():
        async with lock.hold():
            entered.set()
            try:
                await asyncio.sleep(LONG_S)
            finally:
                ended_at = time.monotonic()
    return ended_at


async def test_guarded_block_ends_before_the_next_holder_begins(
    own_redis_server: EmbeddedServer, proxy: Proxy, open_locks: OpenLocks
) -> None:
    """The holder cannot reach the server any more; a waiting contender can."""
    entered = asyncio.Event()
    holding = asyncio.create_task(
        hold_until_lost(open_locks(proxy.url).lock("a", ttl_s=1.0), entered),
    )
    await entered.wait()
    await asyncio.sleep(0.5)  # one renewal
    proxy.conditions = BLACK_HOLE
    async with open_locks(own_redis_server.url).lock("a").hold(timeout_s=WAIT_S):
        acquired_at = time.monotonic()
        assert holding.done()
    assert await holding < acquired_at


async def test_ttl_and_deadline_go_on_while_a_server_is_frozen(
    own_redis_server: EmbeddedServer, open_locks: OpenLocks
) -> None:
    entered = asyncio.Event()
    lock = open_locks(own_redis_server.url, timeout_s=LONG_S).lock("a", ttl_s=0.4)
    holding = asyncio.create_task(hold_until_lost(lock, entered))
    await entered.wait()
    own_redis_server.send_signal(signal.SIGSTOP)
    await holding
    await asyncio.sleep(0.1)  # the tenth of the TTL that was kept back, and some more
    own_redis_server.send_signal(signal.SIGCONT)
    other = open_locks(own_redis_server.url).lock("a")
    assert await other.holder() is None, "its TTL has passed on the server's clock, too"
    async with other.hold():
        pass


async def test_tokens_do_not_go_back_when_the_server_forgets(
    own_redis_server: EmbeddedServer, open_locks: OpenLocks
) -> None:
    entered = asyncio.Event()
    lock = open_locks(own_redis_server.url).lock("a", ttl_s=1.0)
    holding = asyncio.create_task(hold_until_lost(lock, entered))
    await entered.wait()
    holder = await lock.holder()
    assert holder is not None
    await own_redis_server.kill()
    own_redis_server.erase()
    await own_redis_server.start()
    async with open_locks(own_redis_server.url).lock("a").hold() as held:
        assert held.fencing_token > holder.fencing_token
        await holding


async def test_lock_survives_a_restart_with_its_data(
    own_redis_server: EmbeddedServer, open_locks: OpenLocks
) -> None:
    lock = open_locks(own_redis_server.url).lock("a")
    async with lock.hold() as held:
        await held.write(b"1")
        await own_redis_server.restart()
        await held.write(b"2")
        assert await value_of(lock) == b"2"


# --------------------------------------------------------------------------- other servers, other clocks


@pytest.fixture
async def clocked_server(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[ServerUnderTest]]]:
    """Starts servers with a clock that can be set."""
    if faketime_library() is None:
        pytest.skip("needs libfaketime")
    servers: list[ServerUnderTest] = []

    async def start(offset_s: float) -> ServerUnderTest:
        name = f"server {len(servers)}"
        server = ServerUnderTest(name, installed_servers()[0], tmp_path / name, clock=True)
        servers.append(server)
        server.set_clock(offset_s)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.aclose()


async def test_the_owner_decides_where_tokens_cannot(
    clocked_server: Callable[..., Awaitable[ServerUnderTest]],
    open_locks: OpenLocks,
    dynamo_redis_prefix: str,
) -> None:
    """A failover to a replica that never saw the lock, with its clock an hour behind.

    The old holder has the higher token, and still its writes are refused."""
    primary = await clocked_server(0.0)
    replica = await clocked_server(-3600.0)
    await replica.replicate(primary)
    await replica.promote()
    async with Proxy(primary.url) as proxy:
        old, new = (open_locks(url).lock("a", ttl_s=LONG_S) for url in (proxy.url, replica.url))
        with is_lost("it ended on the server"):
            async with old.hold() as held:
                await held.write(b"before")
                proxy.target = replica.url
                proxy.cut()
                async with new.hold() as other:
                    assert other.fencing_token < held.fencing_token
                    await other.write(b"new")
                    await held.write(b"stale")
        storage = RedisLockStorage(RedisClient(replica.url, timeout_s=3.0))
        keys = LockKeys.of_name(dynamo_redis_prefix, "a")
        assert not await storage.write(keys, held.owner, held.fencing_token, 9, b"stale")
        await storage.aclose()
        assert await value_of(new) == b"new"


async def test_a_clock_that_is_set_costs_a_lock_or_a_ttl(
    clocked_server: Callable[..., Awaitable[ServerUnderTest]],
    open_locks: OpenLocks,
    dynamo_redis_prefix: str,
) -> None:
    server = await clocked_server(0.0)
    lock, other = (open_locks(server.url).lock("a", ttl_s=ttl_s) for ttl_s in (0.6, LONG_S))
    tokens = []
    with is_lost():  # set forward: the lock ends at once, its holder learns that at the next renewal
        async with lock.hold() as held:
            tokens.append(held.fencing_token)
            server.set_clock(3600.0)
            async with other.hold() as new:
                tokens.append(new.fencing_token)
                with is_lost():
                    await held.write(b"stale")
    storage = RedisLockStorage(RedisClient(server.url, timeout_s=3.0))
    assert isinstance(await storage.acquire(LockKeys.of_name(dynamo_redis_prefix, "a"), "dead", 0.3, ""), int)
    await storage.aclose()
    server.set_clock(0.0)
    async with other.hold(timeout_s=WAIT_S) as new:  # set back: not held for an hour, but for a TTL
        tokens.append(new.fencing_token)
    assert tokens == sorted(tokens)


async def is_held(lock: Lock) -> bool:
    return await lock.holder() is not None


# --------------------------------------------------------------------------- answers that get lost


async def connect(near: Lock, far: Lock) -> None:
    """Make all connections and load the scripts, so that only answers of scripts that have run are lost."""
    async with near.hold() as held:
        await held.write(b"")
        await far.holder()


@pytest.fixture
async def near_and_far(
    own_redis_server: EmbeddedServer, proxy: Proxy, open_locks: OpenLocks
) -> tuple[Lock, Lock]:
    """A lock, directly and through the proxy. Its TTL is longer than any test."""
    near, far = (open_locks(url).lock("a", ttl_s=2 * WAIT_S) for url in (own_redis_server.url, proxy.url))
    await connect(near, far)
    return near, far


async def test_repeated_acquire_finds_its_own_lock(proxy: Proxy, near_and_far: tuple[Lock, Lock]) -> None:
    near, far = near_and_far
    proxy.conditions = NO_ANSWERS
    entering = far.hold()
    acquiring = asyncio.create_task(entering.__aenter__())
    await until(lambda: is_held(near))
    holder = await near.holder()
    assert holder is not None
    proxy.heal()
    held = await acquiring
    assert (held.owner, held.fencing_token) == (holder.owner, holder.fencing_token)
    with pytest.raises(LockNotAcquired):
        await near.hold().__aenter__()
    await entering.__aexit__(None, None, None)
    assert not await is_held(near)


async def test_an_acquire_that_is_given_up_leaves_nothing(
    own_redis_server: EmbeddedServer, proxy: Proxy, open_locks: OpenLocks
) -> None:
    near = open_locks(own_redis_server.url).lock("a")
    far = open_locks(proxy.url, timeout_s=0.3).lock("a", ttl_s=2 * WAIT_S)
    await connect(near, far)
    proxy.conditions = NO_ANSWERS
    acquiring = asyncio.create_task(far.hold().__aenter__())
    await until(lambda: is_held(near))
    await asyncio.sleep(0.5)
    assert await is_held(near)
    proxy.heal()
    with pytest.raises(StoreUnavailable):
        await acquiring
    assert not await is_held(near)


async def test_renewal_with_lost_answer_is_repeated(
    own_redis_server: EmbeddedServer, proxy: Proxy, open_locks: OpenLocks
) -> None:
    near, far = (open_locks(url).lock("a", ttl_s=1.0) for url in (own_redis_server.url, proxy.url))
    storage = RedisLockStorage(RedisClient(own_redis_server.url, timeout_s=3.0))
    await storage.renew(LockKeys.of_name("p", "a"), "no-owner", 1.0)  # so that the server knows the script
    await storage.aclose()

    async def remaining_s() -> float:
        holder = await near.holder()
        assert holder is not None
        return holder.remaining_s

    async with far.hold() as held:
        proxy.conditions = NO_ANSWERS
        await asyncio.sleep(0.2)
        before_s = await remaining_s()

        async def is_renewed() -> bool:
            return await remaining_s() > before_s

        await until(is_renewed)
        proxy.heal()
        await asyncio.sleep(0.7)  # past the deadline, had the first renewal been the last
        assert not held.lost
        await held.write(b"x")


async def test_write_with_lost_answer_is_repeated(proxy: Proxy, near_and_far: tuple[Lock, Lock]) -> None:
    near, far = near_and_far
    async with far.hold() as held:
        proxy.conditions = NO_ANSWERS
        writing = asyncio.create_task(held.write(b"x"))

        async def is_written() -> bool:
            return await value_of(near) == b"x"

        await until(is_written)
        proxy.heal()
        await writing
        await held.write(b"y")
    assert await value_of(near) == b"y"


async def test_release_with_lost_answer_harms_no_other_holder(
    proxy: Proxy,
    near_and_far: tuple[Lock, Lock],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = near_and_far
    monkeypatch.setattr("dynamo_redis.store.locks.lock.RELEASE_S", 0.2)
    async with far.hold():
        proxy.conditions = NO_ANSWERS
    assert "not released" in caplog.text
    async with near.hold():
        pass


# --------------------------------------------------------------------------- all at once


async def test_no_update_is_lost_or_stale_under_faults(
    own_redis_server: EmbeddedServer, proxy: Proxy, open_locks: OpenLocks
) -> None:
    """Contenders increment one counter, each by a read, a wait and a write.

    Every third hangs for a while, and connections break all the time. Every acknowledged write is counted;
    any other write may be."""
    rng = random.Random(3)
    near = open_locks(own_redis_server.url).lock("a")
    history: list[tuple[int, int]] = []  # token and value of acknowledged writes
    doubtful = 0

    def is_enough() -> bool:
        return len(history) >= 25

    async def count(held: HeldLock) -> None:
        nonlocal doubtful
        stored = await near.read()
        value = int(stored.value) + 1 if stored else 1
        await asyncio.sleep(rng.uniform(0, 0.3 if rng.random() < 0.1 else 0.005))
        try:
            await held.write(b"%d" % value)
        except (StoreUnavailable, asyncio.CancelledError):
            doubtful += 1
            raise
        history.append((held.fencing_token, value))

    async def contend() -> None:
        lock = open_locks(proxy.url, timeout_s=0.3).lock("a", ttl_s=0.2)
        while not is_enough():
            with contextlib.suppress(StoreUnavailable, LockLost, LockNotAcquired):
                async with lock.hold(timeout_s=0.3) as held:
                    await count(held)

    async def disturb() -> None:
        while not is_enough():
            await asyncio.sleep(rng.uniform(0.01, 0.05))
            match rng.randrange(4):
                case 0:
                    proxy.conditions = NO_ANSWERS
                    await asyncio.sleep(0.02)
                    proxy.heal()
                case 1:
                    await stop_for(own_redis_server, 0.05)
                case _:
                    proxy.cut()

    async with asyncio.timeout(10 * WAIT_S), asyncio.TaskGroup() as group:
        group.create_task(disturb())
        for _ in range(8):
            group.create_task(contend())
    stored = await near.read()
    assert stored is not None
    values = [value for _, value in sorted(history)]
    assert values == sorted(set(values)), "in the order of their tokens"
    assert len(history) <= int(stored.value) <= len(history) + doubtful


async def stop_for(server: EmbeddedServer, duration_s: float) -> None:
    server.send_signal(signal.SIGSTOP)
    await asyncio.sleep(duration_s)
    server.send_signal(signal.SIGCONT)
