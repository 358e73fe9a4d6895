"""What a view makes of the registry's events."""

from __future__ import annotations

import asyncio
import logging

import pytest

from dynamo_redis.errors import CannotConnect, InstanceRemoved
from dynamo_redis.runtime.discovery import State
from dynamo_redis.store.base import DeleteCause

from .conftest import Bench, batch, gone, instance, put

EXPIRED, DELETED, REVOKED, RESYNC = (
    DeleteCause.EXPIRED,
    DeleteCause.DELETED,
    DeleteCause.REVOKED,
    DeleteCause.RESYNC,
)


async def settled() -> None:
    """Let the tasks that events started take their first steps."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_registered_instances_are_candidates_in_order(bench: Bench) -> None:
    bench.register(3, 1, 2)
    assert bench.chosen_first() == [1, 2, 3]
    assert bench.client.instance_ids() == [1, 2, 3]


async def test_a_changed_address_is_seen(bench: Bench) -> None:
    bench.register(1)
    old = bench.view.candidates[0].target
    bench.view.apply(batch(put(instance(1, host="elsewhere"))))
    assert bench.view.candidates[0].target.address == "elsewhere:1"
    assert bench.plane.forgotten == [old]


async def test_an_unreadable_record_keeps_the_last_good_one(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.register(1)
    with caplog.at_level(logging.WARNING):
        bench.view.apply(batch(put(instance(1), value=b"null")))
    assert bench.chosen_first() == [1]
    assert "last good record" in caplog.text


async def test_an_instance_on_another_plane_is_left_out_and_named(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    other = instance(1).to_bytes().replace(b'"tcp"', b'"http"')
    with caplog.at_level(logging.WARNING):
        bench.view.apply(batch(put(instance(1), value=other)))
    assert bench.known() == set()
    assert "offers http" in caplog.text


async def test_a_hanging_instance_is_not_chosen_until_it_is_back(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.apply(batch(put(instance(1, ready=False))))
    assert bench.chosen_first() == [2]
    assert bench.view.last_resorts() == []
    bench.view.apply(batch(put(instance(1))))
    assert bench.chosen_first() == [1, 2]


async def test_a_deliberate_delete_lets_requests_finish(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.scripts[1] = [None]
    call = await bench.client.direct("q", 1)
    bench.view.apply(batch(gone(1, DELETED)))
    assert bench.known() == {2}
    assert bench.plane.failed == []
    del call


@pytest.mark.parametrize("cause", [EXPIRED, REVOKED])
async def test_one_lost_instance_fails_what_is_pending_on_it(bench: Bench, cause: DeleteCause) -> None:
    bench.register(1, 2, 3)
    bench.plane.scripts[1] = [None]
    call = await bench.client.direct("q", 1)
    bench.view.apply(batch(gone(1, cause)))
    assert bench.known() == {2, 3}
    with pytest.raises(InstanceRemoved):
        await anext(call)


async def test_what_is_already_answering_is_not_failed(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.plane.scripts[1] = ["first", "second"]
    call = await bench.client.direct("q", 1, annotated=False)
    assert await anext(call) == "first"
    bench.view.apply(batch(gone(1, EXPIRED)))
    assert await anext(call) == "second"


async def test_half_of_them_expiring_together_are_suspects(bench: Bench) -> None:
    bench.register(1, 2, 3, 4)
    bench.view.apply(batch(gone(1, EXPIRED), gone(2, EXPIRED)))
    assert bench.chosen_first() == [3, 4]
    assert bench.known() == {1, 2, 3, 4}
    assert bench.client.instance_ids() == [3, 4]
    await settled()
    assert set(bench.plane.probed) == {1, 2}
    assert bench.client.instance_ids() == [1, 2, 3, 4]


async def test_losses_add_up_within_one_lease_ttl(bench: Bench) -> None:
    bench.register(1, 2, 3, 4)
    bench.view.apply(batch(gone(1, EXPIRED)))
    assert bench.known() == {2, 3, 4}
    bench.clock.now += 9
    bench.view.apply(batch(gone(2, EXPIRED)))
    assert bench.known() == {1, 2, 3, 4}


async def test_losses_far_apart_do_not_add_up(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.view.apply(batch(gone(1, EXPIRED)))
    bench.clock.now += 11
    bench.view.apply(batch(gone(2, EXPIRED)))
    assert bench.known() == {3}


async def test_a_single_instance_that_expires_is_gone(bench: Bench) -> None:
    bench.register(1)
    bench.view.apply(batch(gone(1, EXPIRED)))
    assert bench.known() == set()


async def test_a_single_instance_survives_an_emptied_registry(bench: Bench) -> None:
    bench.register(1)
    bench.view.apply(batch(gone(1, RESYNC), resync="incarnation changed"))
    call = await bench.client.generate("q", annotated=False)
    assert [item async for item in call] == [1]


async def test_deliberate_deletes_make_no_suspects(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.view.apply(batch(gone(1, DELETED), gone(2, REVOKED), gone(3, DELETED)))
    assert bench.known() == set()


async def test_a_suspect_that_refuses_is_dropped(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.alive[1] = False
    bench.view.apply(batch(gone(1, RESYNC), gone(2, RESYNC), resync="incarnation changed"))
    assert bench.known() == {1, 2}
    await settled()
    assert bench.known() == {2}
    assert bench.client.instance_ids() == [2]


async def test_an_emptied_registry_keeps_those_that_answer_in_service(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.apply(batch(gone(1, RESYNC), gone(2, RESYNC), resync="incarnation changed"))
    call = await bench.client.generate("q", annotated=False)
    assert [item async for item in call] in ([1], [2])


async def test_a_suspect_that_registers_again_is_trusted(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.apply(batch(gone(1, RESYNC), gone(2, RESYNC), resync="incarnation changed"))
    bench.register(1)
    assert bench.chosen_first() == [1]
    assert bench.view.get(1).state is State.UP  # type: ignore[union-attr]


async def test_marked_down_is_chosen_last_and_comes_back_when_it_answers(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.mark_down(bench.view.candidates[0], CannotConnect("refused"))
    assert bench.chosen_first() == [2]
    async with asyncio.timeout(5):
        while bench.chosen_first() != [1, 2]:
            await bench.view.wait_for_change()


async def test_wait_for_instances_wakes_at_the_first(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.client.wait_for_instances(5))
    await settled()
    bench.register(7)
    assert await waiting == [7]
