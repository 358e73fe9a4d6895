"""The pace of ticks, and the keepalive's thread, without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.threads import SyncConnection
from dynamo_redis.store.registry.lease import Keepalive, WriterChain
from dynamo_redis.store.registry.reaper import LEASELESS_TICK_S, TICK_S, Pace
from dynamo_redis.store.registry.scripts_api import Renewal, Tick


def test_processes_together_tick_4_or_16_times_a_second() -> None:
    pace = Pace()
    for lease_count, interval_s in ((1, 0.5), (2, 0.5), (3, 0.75), (16, 4.0), (80, 5.0), (8000, 500.0)):
        assert not pace.renewed(Renewal("", lease_count, 0.06))
        pace.ticked(Tick(lease_count, 0, 0.06))
        assert pace.interval_s == interval_s


def test_process_without_a_lease_ticks_every_few_seconds() -> None:
    pace = Pace()
    pace.ticked(Tick(10_000, 0, 0.06))
    assert pace.interval_s == LEASELESS_TICK_S


def test_process_that_finds_ticks_overdue_ticks() -> None:
    pace = Pace()
    assert pace.interval_s == TICK_S, "nothing is known yet"
    pace.ticked(Tick(10_000, 0, 0.06))
    assert pace.renewed(Renewal("", 10_000, 3.0)), "at once"
    pace.ticked(Tick(10_000, 0, 3.0))
    assert pace.interval_s == TICK_S
    pace.ticked(Tick(10_000, 0, 0.06))
    assert pace.interval_s == 10_000 / 16
    pace.ticked(Tick(4, 0, TICK_S))
    assert pace.interval_s == TICK_S
    pace.ticked(Tick(4, 0, 0.3))
    assert pace.interval_s == 1.0


class Answers:
    """A thread's connection with answers that the test sets."""

    is_open = True

    def __init__(self, *answers: Callable[[], Any]) -> None:
        self._answers = list(answers)

    def script(self, *_: object) -> Any:
        return self._answers.pop(0)()


@pytest.fixture
async def keepalive(monkeypatch: pytest.MonkeyPatch) -> Keepalive:
    """A keepalive without its thread: the test makes its steps."""
    monkeypatch.setattr("threading.Thread.start", lambda thread: None)
    made = Keepalive(
        RedisClient("redis://127.0.0.1:1", timeout_s=1.0),
        RegistryKeys("dynamo"),
        LeaseId(1),
        WriterChain(),
        ttl_s=10.0,
        loop_stall_s=0.0,
        on_disturbance=lambda reason: None,
        on_renewed=lambda renewal: None,
        on_refused=lambda error: None,
        on_gone=lambda: None,
        stalled_values=list,
    )
    made.granted("one", asyncio.get_running_loop().time())
    assert made._heartbeat is not None
    made._heartbeat.cancel()
    return made


async def test_given_up_lease_is_looked_at_with_pauses(keepalive: Keepalive) -> None:
    keepalive._loop_stall_s = 0.0
    keepalive._renew_at = 0.0
    keepalive._renew_and_watch(cast("SyncConnection", Answers()))
    assert keepalive._gave_up
    assert keepalive._renew_at > time.monotonic(), "the thread waits until then"


def step(keepalive: Keepalive, *answers: Callable[[], Any]) -> None:
    keepalive._renew_at = 0.0
    keepalive._renew_and_watch(cast("SyncConnection", Answers(*answers)))


async def test_answer_about_the_old_lease_does_not_stop_the_new_one(keepalive: Keepalive) -> None:
    def granted_meanwhile() -> list[bytes]:
        keepalive.granted("two", asyncio.get_running_loop().time())
        return [b"incarnation", b"two"]

    step(keepalive, granted_meanwhile)
    assert keepalive._renew_at < float("inf")
    step(keepalive, lambda: [b"no-lease"])
    assert keepalive._renew_at == float("inf"), "until it is granted again"


async def test_nothing_ends_the_keepalive(keepalive: Keepalive, caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> None:
        raise StoreUnavailable("away")

    step(keepalive, refuse)
    assert caplog.records == []
    step(keepalive, lambda: [b"ok", "what is this"])
    assert "could not be renewed" in caplog.text
    step(keepalive, lambda: [b"ok", b"", 1, 0, 0])
    assert 3.9 < keepalive._deadline - keepalive._renew_at < 4.1


async def test_a_refused_renewal_is_tried_again_soon(keepalive: Keepalive) -> None:
    def refuse() -> Any:
        error = StoreUnavailable("too few replicas")
        error.answered = True
        raise error

    for _ in range(20):
        began_at = time.monotonic()
        step(keepalive, refuse)
        assert keepalive._renew_at - began_at < 10.0 / 32 + (time.monotonic() - began_at)
    keepalive._lease_count = 100_000
    assert keepalive._refused_retry_s() >= 2.5, "all processes together ask no more than the server bears"
