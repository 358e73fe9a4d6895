"""Guarded blocks of code whose lease is lost; the test controls the lease."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dynamo_redis.errors import LockLost, StoreUnavailable
from dynamo_redis.store.base import LockHolder
from dynamo_redis.store.keys import LockKeys
from dynamo_redis.store.locks.guard import LEASE_SHARE, LeaseGuard
from dynamo_redis.store.locks.lock import StoredLocks
from dynamo_redis.store.locks.memory import MemoryLockStorage

SHORT_S = 0.1
LONG_S = 30.0


class Server:
    """The lease that a guard renews, with answers that the test sets."""

    def __init__(self) -> None:
        self.answers = True
        self.is_owner = True
        self.renewals_count = 0

    async def renew(self) -> bool:
        self.renewals_count += 1
        if not self.answers:
            raise StoreUnavailable("away")
        return self.is_owner


def guard_of(server: Server, ttl_s: float = LONG_S, *, age_s: float = 0.0) -> LeaseGuard:
    return LeaseGuard(
        "a", ttl_s=ttl_s, sent_at=time.monotonic() - age_s, attempt_s=ttl_s / 4, renew=server.renew
    )


@contextmanager
def ends_with(error: type[Exception] = LockLost, saying: str | None = None) -> Iterator[None]:
    """The block raises LockLost, and the task is left as if it had never been cancelled."""
    with pytest.raises(error, match=saying):
        yield
    assert cancelling() == 0


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_a_block_that_ends_in_time_ends_as_it_would() -> None:
    async with guard_of(Server()) as guard:
        reasons = [guard.lost]
    reasons.append(guard.lost)
    assert reasons == [None, "it was released"]
    assert guard.released
    with ends_with(KeyError):
        async with guard_of(Server()):
            raise KeyError


async def test_the_lease_is_renewed_while_the_block_runs() -> None:
    server = Server()
    async with guard_of(server, ttl_s=0.5) as guard:
        async with asyncio.timeout(30):
            while server.renewals_count < 4:
                await asyncio.sleep(0.01)
        assert guard.lost is None


async def test_block_is_cancelled_when_a_renewal_finds_the_lease_lost() -> None:
    server = Server()
    server.is_owner = False
    with pytest.raises(LockLost, match="lock a is lost: it ended on the server") as raised:
        async with guard_of(server, ttl_s=SHORT_S):
            await asyncio.sleep(LONG_S)
    assert isinstance(raised.value.__cause__, asyncio.CancelledError)
    assert cancelling() == 0


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_block_is_cancelled_at_the_deadline_without_answers(how: str) -> None:
    server = Server()
    if how == "fails":
        server.answers = False
    guard = guard_of(server, ttl_s=0.3)
    if how == "hangs":
        guard._renew = asyncio.Event().wait
    began_at = time.monotonic()
    with ends_with(saying="not renewed within 90% of its TTL of 0"):
        async with guard:
            await asyncio.sleep(LONG_S)
    assert time.monotonic() - began_at >= LEASE_SHARE * 0.3 - 0.01
    assert cancelling() == 0
    assert not guard.released


async def test_the_lease_counts_from_when_the_call_was_sent() -> None:
    guard = guard_of(Server(), age_s=LEASE_SHARE * LONG_S)
    with ends_with():
        async with guard:
            assert guard.lost is not None
            await asyncio.sleep(LONG_S)


async def test_block_that_hangs_the_loop_is_cancelled_at_next_await() -> None:
    guard = guard_of(Server(), ttl_s=SHORT_S)
    with ends_with():
        async with guard:
            time.sleep(SHORT_S)
            assert guard.lost is not None
            await asyncio.sleep(LONG_S)


async def test_a_block_that_hangs_the_loop_and_ends_is_told() -> None:
    with pytest.raises(LockLost) as raised:
        async with guard_of(Server(), ttl_s=SHORT_S):
            time.sleep(SHORT_S)
    assert raised.value.__cause__ is None


async def test_cancellation_from_elsewhere_stays_a_cancellation() -> None:
    entered = asyncio.Event()

    async def run() -> None:
        async with guard_of(Server()):
            entered.set()
            await asyncio.sleep(LONG_S)

    task = asyncio.create_task(run())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("guard_first", [True, False])
async def test_a_cancellation_by_both_stays_the_other_s(guard_first: bool) -> None:
    guard = guard_of(Server())
    entered = asyncio.Event()

    async def run() -> None:
        async with guard:
            entered.set()
            await asyncio.sleep(LONG_S)

    task = asyncio.create_task(run())
    await entered.wait()
    if guard_first:
        guard._reason = "lost"
        guard._cancel()
        task.cancel()
    else:
        task.cancel()
        guard.lose("lost")
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_timeout_around_a_guard_stays_a_timeout() -> None:
    with ends_with(TimeoutError):
        async with asyncio.timeout(0.01), guard_of(Server()):
            await asyncio.sleep(LONG_S)
    assert cancelling() == 0


async def test_timeout_inside_a_guard_stays_a_timeout() -> None:
    async with guard_of(Server()) as guard:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(LONG_S)
        assert guard.lost is None
    assert guard.released


async def test_lost_guard_of_nested_ones_raises() -> None:
    inner, outer = guard_of(Server()), guard_of(Server())
    with ends_with(saying="outer"):
        async with outer, inner:
            outer.lose("outer")
            await asyncio.sleep(LONG_S)
    assert cancelling() == 0
    assert inner.released

    inner, outer = guard_of(Server()), guard_of(Server())
    async with outer:
        with ends_with(saying="inner"):
            async with inner:
                inner.lose("inner")
                await asyncio.sleep(LONG_S)
    assert cancelling() == 0
    assert outer.released


async def test_a_group_of_tasks_is_cancelled_as_a_whole() -> None:
    cancelled = 0

    async def work() -> None:
        nonlocal cancelled
        try:
            await asyncio.sleep(LONG_S)
        except asyncio.CancelledError:
            cancelled += 1
            raise

    with ends_with():
        async with guard_of(Server()) as guard, asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(work())
            await asyncio.sleep(0)
            guard.lose("lost")
    assert cancelled == 3


async def test_block_that_suppresses_cancellation_raises_at_its_end() -> None:
    with ends_with():
        async with guard_of(Server()) as guard:
            guard.lose("lost")
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                guard.lose("again")  # cancels no second time
            await asyncio.sleep(0.01)
    assert cancelling() == 0


async def test_exception_of_a_cancelled_block_passes_through() -> None:
    with ends_with(KeyError):
        async with guard_of(Server()) as guard:
            guard.lose("lost")
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                raise KeyError from None
    assert cancelling() == 0
    await asyncio.sleep(0)


async def test_a_block_that_ends_before_it_is_cancelled_never_is() -> None:
    with ends_with(saying="lost"):
        async with guard_of(Server()) as guard:
            guard.lose("lost")
    assert cancelling() == 0
    await asyncio.sleep(0.01)


async def test_a_task_that_is_being_cancelled_can_enter() -> None:
    """As in a clean-up that acquires a lock: the guard must not withdraw an earlier cancellation."""
    outcome: list[BaseException] = []

    async def run() -> None:
        try:
            await asyncio.sleep(LONG_S)
        finally:
            try:
                async with guard_of(Server()) as guard:
                    guard.lose("lost")
                    await asyncio.sleep(LONG_S)
            except LockLost as exc:
                outcome.append(exc)
            assert cancelling() == 1

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(outcome) == 1


class SlowAnswers(MemoryLockStorage):
    """Grants and renews at once, and answers late; after `silent_after` calls it does not answer."""

    def __init__(self, silent_after: int) -> None:
        super().__init__()
        self.ends_at = 0.0
        self._calls_left = silent_after

    async def _answer(self, ttl_s: float) -> None:
        self._calls_left -= 1
        if self._calls_left < 0:
            await asyncio.sleep(LONG_S)
        self.ends_at = time.monotonic() + ttl_s
        await asyncio.sleep(0.15)

    async def acquire(self, keys: LockKeys, owner: str, ttl_s: float, process: str) -> int | LockHolder:
        answer = await super().acquire(keys, owner, ttl_s, process)
        await self._answer(ttl_s)
        return answer

    async def renew(self, keys: LockKeys, owner: str, ttl_s: float) -> bool:
        answer = await super().renew(keys, owner, ttl_s)
        await self._answer(ttl_s)
        return answer


@pytest.mark.parametrize("silent_after", [1, 2])
async def test_slow_answers_prolong_nothing(silent_after: int) -> None:
    """Both for the acquiring call and for a renewal: the server's TTL starts before its answer arrives."""
    storage = SlowAnswers(silent_after)
    with ends_with():
        async with StoredLocks(storage, "p").lock("a", ttl_s=0.5).hold():
            try:
                await asyncio.sleep(LONG_S)
            finally:
                cancelled_at = time.monotonic()
    assert cancelled_at < storage.ends_at
