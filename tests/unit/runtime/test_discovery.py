"""The state of an endpoint's view after events of the registry."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from dynamo_redis.errors import CannotConnect, InstanceRemoved
from dynamo_redis.planes.base import Target
from dynamo_redis.runtime.discovery import State
from dynamo_redis.store.base import DeleteCause

from .conftest import NAME, Bench, batch, gone, instance, put

EXPIRED, DELETED, REVOKED, RESYNC = (
    DeleteCause.EXPIRED,
    DeleteCause.DELETED,
    DeleteCause.REVOKED,
    DeleteCause.RESYNC,
)


async def settled() -> None:
    """Let the tasks that events have started run first."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_registered_instances_are_candidates_in_order(bench: Bench) -> None:
    bench.register(3, 1, 2)
    assert bench.chosen_first() == [1, 2, 3]
    assert bench.client.instance_ids() == [1, 2, 3]


async def test_changed_address_makes_a_new_member(bench: Bench) -> None:
    bench.register(1)
    old = bench.view.candidates[0].target
    bench.view.apply(batch(put(instance(1, host="elsewhere"))))
    assert bench.view.candidates[0].target.address == "elsewhere:1"
    assert bench.plane.forgotten == [old]


async def test_unreadable_record_keeps_the_last_good_one(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.register(1)
    with caplog.at_level(logging.WARNING):
        bench.view.apply(batch(put(instance(1), value=b"null")))
    assert bench.chosen_first() == [1]
    assert f"{NAME.instance_key(1)} is not an instance record" in caplog.text


async def test_instance_on_another_plane_is_left_out_and_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    other = instance(1).to_bytes().replace(b'"tcp"', b'"http"')
    with caplog.at_level(logging.WARNING):
        bench.view.apply(batch(put(instance(1), value=other)))
    assert bench.known() == set()
    assert "serves http, this client speaks tcp" in caplog.text


async def test_hanging_instance_is_not_chosen_until_ready(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.apply(batch(put(instance(1, ready=False))))
    assert bench.chosen_first() == [2]
    assert not any(bench.view.last_resorts())
    bench.view.apply(batch(put(instance(1))))
    assert bench.chosen_first() == [1, 2]


async def test_deliberate_delete_lets_requests_finish(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.scripts[1] = [None]
    call = await bench.client.direct("q", 1)
    bench.view.apply(batch(gone(1, DELETED)))
    assert bench.known() == {2}
    assert bench.plane.failed == []
    del call


@pytest.mark.parametrize("cause", [EXPIRED, REVOKED])
async def test_lost_instance_fails_its_pending_requests(bench: Bench, cause: DeleteCause) -> None:
    bench.register(1, 2, 3)
    bench.plane.scripts[1] = [None]
    call = await bench.client.direct("q", 1)
    bench.view.apply(batch(gone(1, cause)))
    assert bench.known() == {2, 3}
    with pytest.raises(InstanceRemoved):
        await anext(call)


async def test_request_with_an_item_survives_a_lost_record(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.plane.scripts[1] = ["first", "second"]
    call = await bench.client.direct("q", 1, annotated=False)
    assert await anext(call) == "first"
    bench.view.apply(batch(gone(1, EXPIRED)))
    assert await anext(call) == "second"


async def test_half_of_the_instances_expiring_become_suspects(bench: Bench) -> None:
    bench.register(1, 2, 3, 4)
    bench.view.apply(batch(gone(1, EXPIRED), gone(2, EXPIRED)))
    assert bench.chosen_first() == [3, 4]
    assert bench.known() == {1, 2, 3, 4}
    assert bench.client.instance_ids() == [1, 2, 3, 4]
    assert bench.confirmed() == [3, 4]
    await settled()
    assert set(bench.plane.probed) == {1, 2}
    assert bench.confirmed() == [1, 2, 3, 4]


async def test_emptied_registry_never_empties_the_list(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.apply(batch(gone(1, RESYNC), gone(2, RESYNC), resync="incarnation changed"))
    assert bench.client.instance_ids() == [1, 2]
    assert [one.instance_id for one in bench.client.instances()] == [1, 2]
    await settled()
    assert bench.client.instance_ids() == [1, 2]


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


async def test_single_instance_that_expires_is_forgotten(bench: Bench) -> None:
    bench.register(1)
    bench.view.apply(batch(gone(1, EXPIRED)))
    assert bench.known() == set()


async def test_single_instance_survives_an_emptied_registry(bench: Bench) -> None:
    bench.register(1)
    bench.view.apply(batch(gone(1, RESYNC), resync="incarnation changed"))
    call = await bench.client.generate("q", annotated=False)
    assert [item async for item in call] == [1]


async def test_deliberate_deletes_make_no_suspects(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.view.apply(batch(gone(1, DELETED), gone(2, REVOKED), gone(3, DELETED)))
    assert bench.known() == set()


async def test_suspect_that_refuses_is_dropped(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.alive[1] = False
    bench.view.apply(batch(gone(1, RESYNC), gone(2, RESYNC), resync="incarnation changed"))
    assert bench.known() == {1, 2}
    await settled()
    assert bench.known() == {2}
    assert bench.client.instance_ids() == [2]


async def test_suspects_may_be_dropped_by_eager_tasks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(target: Target, timeout_s: float) -> None:
        raise CannotConnect("refused")

    class Done(asyncio.Future[None]):
        def set_name(self, name: str) -> None: ...

    def run_at_once(loop: asyncio.AbstractEventLoop, work: Any, **_: Any) -> Any:
        with pytest.raises(StopIteration):
            work.send(None)
        done = Done(loop=loop)
        done.set_result(None)
        return done

    bench.register(1, 2, 3)
    monkeypatch.setattr(bench.plane, "probe", refuse)
    loop = asyncio.get_running_loop()
    loop.set_task_factory(run_at_once)
    try:
        bench.view.apply(batch(*(gone(number, RESYNC) for number in (1, 2, 3)), resync="incarnation changed"))
    finally:
        loop.set_task_factory(None)
    assert bench.known() == set()


async def test_suspects_that_answer_stay_in_service(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.apply(batch(gone(1, RESYNC), gone(2, RESYNC), resync="incarnation changed"))
    call = await bench.client.generate("q", annotated=False)
    assert [item async for item in call] in ([1], [2])


async def test_suspect_that_registers_again_is_up(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.apply(batch(gone(1, RESYNC), gone(2, RESYNC), resync="incarnation changed"))
    bench.register(1)
    assert bench.chosen_first() == [1]
    assert bench.view.get(1).state is State.UP  # type: ignore[union-attr]


async def test_down_instance_is_chosen_last_until_it_answers(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.mark_down(bench.view.candidates[0], CannotConnect("refused"))
    assert bench.chosen_first() == [2]
    async with asyncio.timeout(30):
        while bench.chosen_first() != [1, 2]:
            await bench.view.wait_for_change()


async def test_wait_for_instances_ends_at_the_first(bench: Bench) -> None:
    waiting = bench.client.wait_for_instances(5)
    await settled()
    bench.register(7)
    assert await waiting == [7]


async def test_quiet_instance_is_avoided_until_it_answers(bench: Bench) -> None:
    bench.register(1, 2)
    bench.view.note_quiet(bench.view.candidates[0].target)
    assert bench.chosen_first() == [2]
    assert bench.client.instance_ids() == [1, 2]
    await settled()
    assert bench.chosen_first() == [1, 2]


async def test_quiet_instance_that_fails_a_probe_is_down(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.alive[1] = False
    bench.view.note_quiet(bench.view.candidates[0].target)
    await settled()
    assert bench.chosen_first() == [2]
    assert bench.client.instance_ids() == [2]


async def test_silence_at_an_old_address_is_ignored(bench: Bench) -> None:
    bench.register(1, 2)
    old = bench.view.candidates[0].target
    bench.view.apply(batch(put(instance(1, host="elsewhere"))))
    bench.view.note_quiet(old)
    assert bench.chosen_first() == [1, 2]


async def test_quiet_instance_keeps_sent_requests_only(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.plane.unconnected.add(1)
    bench.plane.scripts = {1: [None], 2: [None], 3: ["from another"]}
    target: dict[int, Target] = {member.instance_id: member.target for member in bench.view}
    unsent, sent = await bench.client.direct("q", 1), await bench.client.direct("q", 2)
    bench.view.note_quiet(target[1])
    bench.view.note_quiet(target[2])
    assert [(number, type(error)) for number, error in bench.plane.failed] == [(1, CannotConnect)]
    del unsent, sent


async def test_only_instance_is_chosen_while_quiet(bench: Bench) -> None:
    bench.register(1)
    bench.plane.alive[1] = False
    bench.plane.unconnected.add(1)
    bench.plane.scripts[1] = [None]
    call = await bench.client.generate("q")
    bench.view.note_quiet(bench.view.candidates[0].target)
    assert bench.plane.failed == []
    another = await bench.client.generate("q")
    assert len(bench.plane.opened) == 2
    del call, another


async def test_requests_fail_soon_where_all_instances_are_down(bench: Bench) -> None:
    bench.register(1)
    bench.plane.unconnected.add(1)
    bench.plane.scripts[1] = [None]
    (member,) = bench.view.candidates
    bench.view.mark_down(member, CannotConnect("no answer"))
    call = await bench.client.generate("q")
    bench.view.note_quiet(member.target)
    with pytest.raises(CannotConnect):
        await anext(call)


async def test_last_resorts_are_ordered_by_state(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.plane.scripts = {number: [CannotConnect("refused")] for number in (1, 2, 3)}
    target: dict[int, Target] = {member.instance_id: member.target for member in bench.view}
    bench.view.mark_down(bench.view.candidates[0], CannotConnect("refused"))
    bench.view.note_quiet(target[2])
    bench.view.apply(batch(gone(3, RESYNC), resync="incarnation changed"))
    assert bench.chosen_first() == []
    with pytest.raises(CannotConnect):
        [item async for item in await bench.client.generate("q")]
    assert [number for number, _ in bench.plane.opened] == [3, 2, 1]


async def test_down_instance_that_expires_is_forgotten_at_once(bench: Bench) -> None:
    bench.register(1, 2)
    for member in tuple(bench.view.candidates):
        bench.view.mark_down(member, CannotConnect("no answer"))
    bench.view.apply(batch(gone(1, EXPIRED), gone(2, EXPIRED)))
    assert bench.known() == set()


async def test_down_instance_survives_a_wiped_registry(bench: Bench) -> None:
    bench.register(1)
    bench.view.mark_down(bench.view.candidates[0], CannotConnect("no answer"))
    bench.view.apply(batch(gone(1, RESYNC), resync="incarnation changed"))
    assert bench.known() == {1}
    await settled()
    assert bench.client.instance_ids() == [1]


async def test_suspect_that_fails_a_request_is_dropped(bench: Bench) -> None:
    bench.register(1)
    bench.view.apply(batch(gone(1, RESYNC), resync="incarnation changed"))
    member = bench.view.get(1)
    assert member is not None
    bench.view.mark_down(member, CannotConnect("refused"))
    assert bench.known() == set()


@pytest.mark.parametrize("cause", [EXPIRED, RESYNC, DELETED, REVOKED])
async def test_delete_and_put_in_one_batch_keep_the_instance(bench: Bench, cause: DeleteCause) -> None:
    bench.register(1, 2, 3)
    bench.view.apply(batch(gone(1, cause), put(instance(1))))
    assert bench.chosen_first() == [1, 2, 3]
    bench.view.apply(batch(gone(2, cause), put(instance(2, host="elsewhere"))))
    assert bench.chosen_first() == [1, 2, 3]


async def test_put_and_delete_in_one_batch_leave_no_instance(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.view.apply(batch(gone(1, EXPIRED), put(instance(1)), gone(1, EXPIRED)))
    assert bench.known() == {2, 3}
