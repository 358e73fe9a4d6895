"""The ejection of instances that fail one request after the other."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_redis.errors import EngineFailed, HandlerFailed, InvalidRequest, PlaneError
from dynamo_redis.runtime import ejection
from dynamo_redis.runtime.ejection import FAILURE_COUNT, FailureStreak, may_eject

from .conftest import Bench, batch, instance, put


async def fail(bench: Bench, instance_id: int, count: int, error: PlaneError | None = None) -> None:
    for _ in range(count):
        bench.plane.scripts[instance_id] = [error or HandlerFailed("no luck")]
        with pytest.raises(PlaneError):
            await anext(await bench.client.direct("q", instance_id))


async def answer(bench: Bench, instance_id: int) -> None:
    bench.plane.scripts[instance_id] = ["fine"]
    await anext(await bench.client.direct("q", instance_id))


def test_pauses_grow_until_a_success() -> None:
    streak = FailureStreak()
    assert [streak.add() for _ in range(FAILURE_COUNT)] == [False] * (FAILURE_COUNT - 1) + [True]
    pauses = [streak.next_pause_s()]
    for _ in range(10):
        assert streak.add()
        pauses.append(streak.next_pause_s())
    assert 0.75 <= pauses[0] <= 1.25
    assert 1.5 <= pauses[1] <= 2.5
    assert 45 <= pauses[-1] <= 75
    streak.end()
    assert not streak.add()


def test_may_eject_keeps_half_of_the_instances() -> None:
    assert [may_eject(ejected, 5) for ejected in range(4)] == [True, True, False, False]
    assert not may_eject(0, 1)


@pytest.mark.parametrize("error", [HandlerFailed("no luck"), EngineFailed("500")])
async def test_failing_instance_is_no_candidate(bench: Bench, error: PlaneError) -> None:
    bench.register(1, 2)
    await fail(bench, 1, FAILURE_COUNT - 1, error)
    assert bench.chosen_first() == [1, 2]
    await fail(bench, 1, 1, error)
    assert bench.chosen_first() == [2]
    assert bench.client.instance_ids() == [1, 2]  # it is listed
    await answer(bench, 1)  # and can be called by its id


async def test_success_ends_the_failure_streak(bench: Bench) -> None:
    bench.register(1, 2)
    for _ in range(3):
        await fail(bench, 1, FAILURE_COUNT - 1)
        await answer(bench, 1)
    assert bench.chosen_first() == [1, 2]


async def test_invalid_requests_eject_no_instance(bench: Bench) -> None:
    bench.register(1, 2)
    await fail(bench, 1, 2 * FAILURE_COUNT, InvalidRequest("nonsense"))
    assert bench.chosen_first() == [1, 2]


async def test_half_of_the_instances_is_never_ejected(bench: Bench) -> None:
    bench.register(1, 2, 3)
    for instance_id in (1, 2, 3):
        await fail(bench, instance_id, FAILURE_COUNT)
    assert bench.chosen_first() == [2, 3]


async def test_ejected_instance_returns_on_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ejection, "PAUSE_S", (0.01, 0.01))
    bench.register(1, 2)
    await fail(bench, 1, FAILURE_COUNT)
    for _ in range(2):
        async with asyncio.timeout(20):
            while bench.chosen_first() != [1, 2]:
                await bench.view.wait_for_change()
        await fail(bench, 1, 1)
        assert bench.chosen_first() == [2]


async def test_new_record_does_not_end_an_ejection(bench: Bench) -> None:
    bench.register(1, 2)
    await fail(bench, 1, FAILURE_COUNT)
    bench.view.apply(batch(put(instance(1))))
    assert bench.chosen_first() == [2]
    bench.view.apply(batch(put(instance(1, host="elsewhere"))))  # another process
    assert bench.chosen_first() == [1, 2]


async def test_engine_failures_are_tried_on_three_instances(bench: Bench) -> None:
    bench.register(1, 2, 3, 4)
    for instance_id in (1, 2, 3, 4):
        bench.plane.scripts[instance_id] = [EngineFailed("500")]
    with pytest.raises(EngineFailed):
        await anext(await bench.client.round_robin("q"))
    assert len({instance_id for instance_id, _ in bench.plane.opened}) == len(bench.plane.opened) == 3
