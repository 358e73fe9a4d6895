"""An instance that fails one request after the other is passed over for a while."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_redis.errors import EngineFailed, HandlerFailed, InvalidRequest, PlaneError
from dynamo_redis.runtime import ejection
from dynamo_redis.runtime.ejection import FAILURE_COUNT, Record, may_eject

from .conftest import Bench, batch, instance, put


async def fail(bench: Bench, instance_id: int, count: int, error: PlaneError | None = None) -> None:
    for _ in range(count):
        bench.plane.scripts[instance_id] = [error or HandlerFailed("no luck")]
        with pytest.raises(PlaneError):
            await anext(await bench.client.direct("q", instance_id))


async def answer(bench: Bench, instance_id: int) -> None:
    bench.plane.scripts[instance_id] = ["fine"]
    await anext(await bench.client.direct("q", instance_id))


def test_pauses_grow_until_an_answer_comes() -> None:
    record = Record()
    assert [record.failed() for _ in range(FAILURE_COUNT)] == [False] * (FAILURE_COUNT - 1) + [True]
    pauses = [record.next_pause_s()]
    for _ in range(10):
        assert record.failed()
        pauses.append(record.next_pause_s())
    assert 0.75 <= pauses[0] <= 1.25
    assert 1.5 <= pauses[1] <= 2.5
    assert 45 <= pauses[-1] <= 75
    record.answered()
    assert not record.failed()


def test_half_of_the_instances_stay() -> None:
    assert [may_eject(ejected, 5) for ejected in range(4)] == [True, True, False, False]
    assert not may_eject(0, 1)


@pytest.mark.parametrize("error", [HandlerFailed("no luck"), EngineFailed("500")])
async def test_failing_instance_is_no_candidate(bench: Bench, error: PlaneError) -> None:
    bench.register(1, 2)
    await fail(bench, 1, FAILURE_COUNT - 1, error)
    assert bench.chosen_first() == [1, 2]
    await fail(bench, 1, 1, error)
    assert bench.chosen_first() == [2]
    assert bench.client.instance_ids() == [1, 2]  # it is there, and shown
    await answer(bench, 1)  # and can be asked for by its id


async def test_answers_between_failures_clear_the_record(bench: Bench) -> None:
    bench.register(1, 2)
    for _ in range(3):
        await fail(bench, 1, FAILURE_COUNT - 1)
        await answer(bench, 1)
    assert bench.chosen_first() == [1, 2]


async def test_requests_at_fault_eject_no_instance(bench: Bench) -> None:
    bench.register(1, 2)
    await fail(bench, 1, 2 * FAILURE_COUNT, InvalidRequest("nonsense"))
    assert bench.chosen_first() == [1, 2]


async def test_last_half_stays_whatever_it_answers(bench: Bench) -> None:
    bench.register(1, 2, 3)
    for instance_id in (1, 2, 3):
        await fail(bench, instance_id, FAILURE_COUNT)
    assert bench.chosen_first() == [2, 3]


async def test_ejected_instance_comes_back_on_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ejection, "PAUSE_S", (0.01, 0.01))
    bench.register(1, 2)
    await fail(bench, 1, FAILURE_COUNT)
    for _ in range(2):
        async with asyncio.timeout(20):
            while bench.chosen_first() != [1, 2]:
                await bench.view.wait_for_change()
        await fail(bench, 1, 1)
        assert bench.chosen_first() == [2]


async def test_new_record_brings_no_ejected_instance_back(bench: Bench) -> None:
    bench.register(1, 2)
    await fail(bench, 1, FAILURE_COUNT)
    bench.view.apply(batch(put(instance(1))))
    assert bench.chosen_first() == [2]
    bench.view.apply(batch(put(instance(1, host="elsewhere"))))  # another process
    assert bench.chosen_first() == [1, 2]


async def test_engines_that_fail_are_tried_at_three_instances(bench: Bench) -> None:
    bench.register(1, 2, 3, 4)
    for instance_id in (1, 2, 3, 4):
        bench.plane.scripts[instance_id] = [EngineFailed("500")]
    with pytest.raises(EngineFailed):
        await anext(await bench.client.round_robin("q"))
    assert len({instance_id for instance_id, _ in bench.plane.opened}) == len(bench.plane.opened) == 3
