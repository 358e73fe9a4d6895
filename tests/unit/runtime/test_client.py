"""Calls: the choice of instances, retries before the first item, and the state after the end."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import pytest

from dynamo_redis.errors import (
    AuthenticationFailed,
    CannotConnect,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    HandlerFailed,
    InvalidRequest,
    NoInstances,
    NotAccepted,
    Overloaded,
    PeerSilent,
    PlaneError,
    RequestCancelled,
)
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.among import LiveIds
from dynamo_redis.runtime.annotated import Annotated
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.selection import policy

from .conftest import Bench, instance, put


async def collect(call: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in call]


def loads(bench: Bench) -> list[tuple[int, int]]:
    """Return (in flight, pending) of each instance."""
    return [(member.in_flight, len(member.pending)) for member in bench.view]


async def test_items_are_annotated_unless_plain_ones_are_wanted(bench: Bench) -> None:
    bench.register(1)
    bench.plane.scripts[1] = ["a", "b"]
    annotated = await collect(await bench.client.round_robin("q"))
    assert all(isinstance(item, Annotated) for item in annotated)
    assert [item.data() for item in annotated] == ["a", "b"]
    assert await collect(await bench.client.round_robin("q", annotated=False)) == ["a", "b"]


async def test_falsy_items_and_requests_arrive(bench: Bench) -> None:
    bench.register(1)
    bench.plane.scripts[1] = ["", 0, False]
    assert await collect(await bench.client.round_robin(None, annotated=False)) == ["", 0, False]
    assert bench.plane.opened == [(1, None)]


async def test_next_items_are_all_that_have_come(bench: Bench) -> None:
    bench.register(1)
    bench.plane.scripts[1] = ["a", "b", ConnectionLost("gone")]
    call = await bench.client.round_robin(None, annotated=False)
    assert await call.next_items() == ["a", "b"]
    assert not call.is_over
    with pytest.raises(ConnectionLost):
        await call.next_items()
    assert await call.next_items() == []
    bench.plane.scripts[1] = ["a", "b"]
    annotated = await bench.client.round_robin(None)
    assert [item.data() for item in await annotated.next_items()] == ["a", "b"]
    assert annotated.is_over
    assert await annotated.next_items() == []


async def test_missing_instance_is_an_error_at_once(bench: Bench) -> None:
    with pytest.raises(NoInstances, match=r"dynamo\.backend\.generate"):
        await bench.client.generate("q")


async def test_lost_request_is_sent_to_three_instances_at_most(bench: Bench) -> None:
    bench.register(1, 2, 3, 4, 5)
    bench.plane.scripts = {number: [ConnectionLost("it hangs")] for number in range(1, 6)}
    with pytest.raises(ConnectionLost):
        [item async for item in await bench.client.round_robin("poison", annotated=False)]
    assert len(bench.plane.opened) == 3


async def test_unanswered_request_is_sent_to_two_instances_at_most(bench: Bench) -> None:
    bench.register(1, 2, 3, 4, 5)
    bench.plane.scripts = {number: [PeerSilent("it hangs")] for number in range(1, 6)}
    with pytest.raises(PeerSilent, match="2 instances fell silent with this request"):
        await collect(await bench.client.round_robin("poison", annotated=False))
    assert len(bench.plane.opened) == 2


@pytest.mark.parametrize("error", [PeerSilent("x"), ConnectionLost("x"), NotAccepted("x")])
async def test_lost_request_goes_to_an_instance_that_answers(bench: Bench, error: PlaneError) -> None:
    """Five of six hang: only the one that answers a probe gets the request."""
    bench.register(1, 2, 3, 4, 5, 6)
    bench.plane.scripts = {number: [error] for number in (1, 2, 3, 4, 5)}
    bench.plane.alive = dict.fromkeys((1, 2, 3, 4, 5), False)
    first = next(member for member in bench.view if member.instance_id == 1)
    call = Call(bench.client.dispatcher, policy("round_robin", Random()), "q", False, None, member=first)
    assert await collect(call) == [6]
    assert [number for number, _ in bench.plane.opened] == [1, 6]


@pytest.mark.parametrize("error", [CannotConnect("x"), ConnectionLost("x"), Draining("x"), Overloaded("x")])
async def test_request_that_fails_before_an_item_is_sent_elsewhere(bench: Bench, error: PlaneError) -> None:
    bench.register(1, 2)
    bench.plane.scripts[1] = [error]
    for _ in range(4):
        assert await collect(await bench.client.round_robin("q", annotated=False)) == [2]
    assert loads(bench) == [(0, 0), (0, 0)]


async def test_instance_is_avoided_after_its_first_refusal(bench: Bench) -> None:
    bench.register(1, 2, 3)
    bench.plane.scripts[1] = [CannotConnect("refused")]
    bench.plane.alive[1] = False
    for _ in range(30):
        await collect(await bench.client.round_robin("q"))
    assert [number for number, _ in bench.plane.opened].count(1) == 1


async def test_overloaded_instance_is_not_marked_down(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.scripts[1] = [Overloaded("full")]
    await collect(await bench.client.round_robin("q"))
    await collect(await bench.client.round_robin("q"))
    assert bench.chosen_first() == [1, 2]


async def test_overload_is_tried_at_three_instances_only(bench: Bench) -> None:
    bench.register(*range(1, 11))
    for number in range(1, 11):
        bench.plane.scripts[number] = [Overloaded("full", 2.0)]
    with pytest.raises(Overloaded) as caught:
        await collect(await bench.client.round_robin("q"))
    assert caught.value.retry_after_s == 2.0
    assert len(bench.plane.opened) == 3


async def test_each_instance_is_tried_once_then_the_error_raised(bench: Bench) -> None:
    bench.register(1, 2, 3)
    for number in (1, 2, 3):
        bench.plane.scripts[number] = [CannotConnect(f"refused by {number}")]
        bench.plane.alive[number] = False
    with pytest.raises(CannotConnect):
        await collect(await bench.client.round_robin("q"))
    assert sorted(number for number, _ in bench.plane.opened) == [1, 2, 3]


@pytest.mark.parametrize("error", [InvalidRequest("bad"), HandlerFailed("boom"), DeadlineExceeded("late")])
async def test_other_errors_are_raised_at_once(bench: Bench, error: PlaneError) -> None:
    bench.register(1, 2)
    bench.plane.scripts[1] = bench.plane.scripts[2] = [error]
    with pytest.raises(type(error)):
        await collect(await bench.client.round_robin("q"))
    assert len(bench.plane.opened) == 1


async def test_request_is_not_sent_again_after_its_first_item(bench: Bench) -> None:
    bench.register(1, 2)
    for number in (1, 2):
        bench.plane.scripts[number] = ["item", ConnectionLost("cut")]
    call = await bench.client.round_robin("q", annotated=False)
    assert await anext(call) == "item"
    with pytest.raises(ConnectionLost):
        await anext(call)
    assert len(bench.plane.opened) == 1
    assert loads(bench) == [(0, 0), (0, 0)]


async def test_stopped_request_is_not_sent_again(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.scripts[1] = bench.plane.scripts[2] = [CannotConnect("x")]
    context = Context()
    call = await bench.client.round_robin("q", context=context)
    context.stop_generating()
    with pytest.raises(CannotConnect):
        await anext(call)
    assert len(bench.plane.opened) == 1


async def test_outdated_secret_is_read_again_once(bench: Bench) -> None:
    bench.register(1)
    bench.plane.scripts[1] = [AuthenticationFailed("old secret")]
    bench.registry.record = put(instance(1, secret=b"new")).record
    with pytest.raises(AuthenticationFailed):
        await collect(await bench.client.round_robin("q"))
    assert bench.registry.reads == 1
    assert len(bench.plane.opened) == 2
    (member,) = bench.view
    assert member.target.secret == b"new"


async def test_instance_with_an_unknown_secret_is_avoided(bench: Bench) -> None:
    """Otherwise each request that tried it would read its record again: another process has its port."""
    bench.register(1, 2)
    bench.plane.scripts[1] = [AuthenticationFailed("who are you?")]
    bench.plane.alive[1] = False
    bench.registry.record = put(instance(1)).record
    for _ in range(10):
        assert await collect(await bench.client.round_robin("q", annotated=False)) == [2]
    assert bench.registry.reads == 1
    assert bench.chosen_first() == [2]


async def test_direct_reaches_its_instance_and_no_other(bench: Bench) -> None:
    bench.register(1, 2)
    assert await collect(await bench.client.direct("q", 2, annotated=False)) == [2]
    with pytest.raises(NoInstances, match="instance 9 is not among the 2 known"):
        await bench.client.direct("q", 9)
    bench.plane.scripts[1] = [CannotConnect("x")]
    with pytest.raises(CannotConnect):
        await collect(await bench.client.direct("q", 1))
    assert [number for number, _ in bench.plane.opened] == [2, 1]


async def test_in_flight_counts_until_the_end(bench: Bench) -> None:
    bench.register(1)
    bench.plane.scripts[1] = ["a", "b"]
    call = await bench.client.round_robin("q")
    assert loads(bench) == [(1, 1)]
    await anext(call)
    assert loads(bench) == [(1, 0)]
    await collect(call)
    assert loads(bench) == [(0, 0)]


async def test_dropped_iterator_kills_the_request(bench: Bench) -> None:
    bench.register(1)
    bench.plane.scripts[1] = ["a", None]
    call = await bench.client.round_robin("q")
    await anext(call)
    del call
    gc.collect()
    await asyncio.sleep(0)  # the event loop runs the finaliser
    assert [number for number, _ in bench.plane.failed] == [1]
    assert loads(bench) == [(0, 0)]


async def test_close_after_a_cancelled_read_leaves_no_request(bench: Bench) -> None:
    bench.register(1)
    bench.plane.scripts[1] = [None]
    call = await bench.client.round_robin("q")
    waiting = asyncio.ensure_future(anext(call))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await call.aclose()
    assert loads(bench) == [(0, 0)]


async def test_router_modes(bench: Bench) -> None:
    bench.register(1, 2)
    client = bench.client
    for call in (client.random, client.p2c, client.least_loaded, client.generate):
        assert await collect(await call("q", annotated=False)) in ([1], [2])


async def search_after_a_loss(bench: Bench, context: Context) -> asyncio.Task[list[Any]]:
    """Make a call that has lost its instance and hangs in the probe of the next one."""
    bench.register(1, 2)
    bench.plane.scripts = {number: [ConnectionLost("it broke")] for number in (1, 2)}
    bench.plane.hanging = {1, 2}
    call = await bench.client.round_robin("q", annotated=False, context=context)
    reading = asyncio.create_task(collect(call))
    async with asyncio.timeout(30):
        while not bench.plane.probed:
            await asyncio.sleep(0)
    return reading


async def test_deadline_ends_the_search_for_another_instance(bench: Bench) -> None:
    context = Context(deadline=time.monotonic() + 0.2)
    reading = await search_after_a_loss(bench, context)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(reading, 30)
    assert len(bench.plane.opened) == 1
    assert loads(bench) == [(0, 0)] * 2


@pytest.mark.parametrize("end", [Context.stop_generating, Context.kill])
async def test_cancelling_ends_the_search_for_another_instance(
    bench: Bench, end: Callable[[Context], None]
) -> None:
    context = Context()
    reading = await search_after_a_loss(bench, context)
    end(context)
    context.kill()
    with pytest.raises(RequestCancelled):
        await asyncio.wait_for(reading, 30)
    assert len(bench.plane.opened) == 1


async def test_closed_call_is_sent_to_no_other_instance(bench: Bench) -> None:
    bench.register(1, 2)
    bench.plane.scripts = {number: [ConnectionLost("it broke")] for number in (1, 2)}
    call = await bench.client.round_robin("q", annotated=False)
    reading = asyncio.create_task(collect(call))
    async with asyncio.timeout(30):
        while not bench.plane.probed:
            await asyncio.sleep(0)
    await call.aclose()
    assert await asyncio.wait_for(reading, 30) == []
    assert len(bench.plane.opened) == 1
    assert loads(bench) == [(0, 0)] * 2


async def test_live_ids_are_read_at_each_choice(bench: Bench) -> None:
    bench.register(1, 2, 3)
    ids = LiveIds()
    ids.set(frozenset({1}))
    assert await collect(await bench.client.generate("q", annotated=False, among=ids)) == [1]
    bench.plane.scripts[1] = [Draining("it leaves")]
    call = await bench.client.generate("q", annotated=False, among=ids)
    ids.set(frozenset({1, 3}))  # while it is under way
    assert await collect(call) == [3]
    ids.set(frozenset())
    with pytest.raises(NoInstances):
        await bench.client.generate("q", among=ids)
