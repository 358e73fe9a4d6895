"""Reads of a call's answer: time-outs, a second reader, and a request that is sent again."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from dynamo_redis.errors import NoInstances, Overloaded, PlaneError
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import DistributedRuntime, discovery, dynamo_endpoint
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.route import Hop
from dynamo_redis.runtime.selection import Policy, policy
from tests.integration.conftest import OpenRuntime
from tests.integration.runtime.test_runtime import until

ENDPOINT = "test.reads.count"

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")


async def client_of(runtime: DistributedRuntime, count: int = 1) -> Client:
    client = await runtime.endpoint(ENDPOINT).client()
    await until(lambda: len(client.instance_ids()) == count)
    return client


class Counter:
    """Answers 0, 1, 2, each when it is let."""

    def __init__(self) -> None:
        self.go_on = asyncio.Semaphore(0)
        self.ended = asyncio.Event()

    async def count(self, _: Any, context: Context) -> AsyncIterator[int]:
        try:
            for number in range(3):
                await self.go_on.acquire()
                yield number
        finally:
            self.ended.set()


async def test_read_that_times_out_goes_on(open_runtime: OpenRuntime) -> None:
    counter = Counter()
    await (await open_runtime()).endpoint(ENDPOINT).start_serving(counter.count)
    call = await (await client_of(await open_runtime())).round_robin(None, annotated=False)
    for number in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(call), 0.01)
        counter.go_on.release()
        assert await asyncio.wait_for(anext(call), 30) == number
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(call), 30)


async def test_dropped_call_is_killed_after_a_cancelled_read(open_runtime: OpenRuntime) -> None:
    counter = Counter()
    await (await open_runtime()).endpoint(ENDPOINT).start_serving(counter.count)
    client = await client_of(await open_runtime())

    async def read() -> None:
        async for _ in await client.round_robin(None, annotated=False):
            pass

    reader = asyncio.create_task(read())
    await until(lambda: counter.go_on.locked() and bool(counter.go_on._waiters))
    reader.cancel()
    with suppress(asyncio.CancelledError):
        await reader
    await asyncio.wait_for(counter.ended.wait(), 30)


async def test_second_reader_leaves_the_first_one_alone(open_runtime: OpenRuntime) -> None:
    counter = Counter()
    await (await open_runtime()).endpoint(ENDPOINT).start_serving(counter.count)
    call = await (await client_of(await open_runtime())).round_robin(None, annotated=False)
    first = asyncio.create_task(read_all(call))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await anext(call)
    for _ in range(3):
        counter.go_on.release()
    assert await asyncio.wait_for(first, 30) == [0, 1, 2]


async def read_all(call: Call) -> list[Any]:
    return [item async for item in call]


class _HesitantRoute:
    """A `Route` that waits a moment before it chooses another instance."""

    def __init__(self, dispatcher: Dispatcher, select: Policy) -> None:
        self._dispatcher = dispatcher
        self._select = select
        self.is_choosing = False

    def failed(self, member: Member, error: PlaneError, *, was_answered: bool) -> bool:
        self._dispatcher.note_failure(member, error)
        return True

    async def choose_again(self, tried: set[int], request: Any) -> Hop:
        self.is_choosing = True
        await asyncio.sleep(0.05)
        self.is_choosing = False
        return Hop(self._dispatcher, self._dispatcher.choose(self._select, tried), request)

    def ended(self) -> None:
        pass


def hesitant_call(client: Client, member: Member) -> tuple[Call, _HesitantRoute]:
    """Send a request to `member`, by a call that waits before it chooses another instance."""
    select = policy("round_robin", Random(1))
    route = _HesitantRoute(client.dispatcher, select)
    return Call(client.dispatcher, select, None, False, None, member=member, route=route), route


async def refuse(_: Any) -> None:
    raise Overloaded("no")


async def test_read_may_time_out_between_two_instances(open_runtime: OpenRuntime) -> None:
    async def answer(_: Any) -> AsyncIterator[str]:
        yield "answer"

    await (await open_runtime()).endpoint(ENDPOINT).start_serving(refuse)
    good = await (await open_runtime()).endpoint(ENDPOINT).start_serving(answer)
    client = await client_of(await open_runtime(), 2)
    refusing = next(one for one in client._view if one.instance_id != good.instance.instance_id)
    call, route = hesitant_call(client, refusing)
    reader = asyncio.create_task(call.__anext__())
    await until(lambda: route.is_choosing)
    with pytest.raises(RuntimeError, match="one reader"):
        await anext(call)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await asyncio.wait_for(read_all(call), 30) == ["answer"]


async def test_error_stays_after_a_cancelled_search(open_runtime: OpenRuntime) -> None:
    await (await open_runtime()).endpoint(ENDPOINT).start_serving(refuse)
    client = await client_of(await open_runtime())
    only = next(iter(client._view))
    call, route = hesitant_call(client, only)
    reader = asyncio.create_task(call.__anext__())
    await until(lambda: route.is_choosing)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    with pytest.raises(Overloaded):
        await asyncio.wait_for(anext(call), 30)


async def test_request_is_sent_again_as_it_was(open_runtime: OpenRuntime) -> None:
    """A caller may reuse its object for the next request while the first is under way."""
    refused: list[str] = []

    async def full(request: dict[str, str]) -> None:
        refused.append(request["prompt"])
        raise Overloaded("full")

    async def good(request: dict[str, str]) -> AsyncIterator[str]:
        yield request["prompt"]

    await (await open_runtime()).endpoint(ENDPOINT).start_serving(full)
    await (await open_runtime()).endpoint(ENDPOINT).start_serving(good)
    client = await client_of(await open_runtime(), 2)
    request: dict[str, str] = {}
    calls: list[tuple[str, Call]] = []
    for number in range(6):
        request["prompt"] = f"prompt {number}"
        calls.append((request["prompt"], await client.round_robin(request, annotated=False)))
    for prompt, call in calls:
        assert await asyncio.wait_for(read_all(call), 30) == [prompt]
    assert len(refused) == 3


@pytest.mark.parametrize("kind", ["coroutine", "generator", "endpoint", "nested"])
async def test_handlers_have_context_variables_of_their_own(open_runtime: OpenRuntime, kind: str) -> None:
    """Two run at a time, so that most start when another ends."""

    async def coroutine(request: str) -> str:
        before = tenant.get()
        tenant.set(request)
        await asyncio.sleep(0.001)
        return f"{before} {tenant.get()}"

    async def generator(request: str) -> AsyncIterator[str]:
        yield await coroutine(request)

    async def nested(request: str) -> AsyncIterator[str]:
        tenant.set(f"{request} outside")
        call = await inner.round_robin(request, annotated=False)
        async for item in call:
            assert tenant.get() == f"{request} outside"
            yield item

    worker = await open_runtime(max_in_flight_count=2)
    handlers: dict[str, Any] = {
        "coroutine": coroutine,
        "generator": generator,
        "endpoint": dynamo_endpoint(str, str)(generator),
        "nested": nested,
    }
    if kind == "nested":
        await (
            (await open_runtime(max_in_flight_count=2)).endpoint("test.reads.inner").start_serving(coroutine)
        )
        inner = await worker.endpoint("test.reads.inner").client()
        await inner.wait_for_instances(10)
    await worker.endpoint(ENDPOINT).start_serving(handlers[kind])
    client = await client_of(await open_runtime())

    async def ask(name: str) -> None:
        tenant.set("the caller's")
        call = await client.round_robin(name, annotated=False)
        assert await asyncio.wait_for(read_all(call), 20) == [f"none {name}"]

    await asyncio.gather(*(asyncio.create_task(ask(f"tenant {number}")) for number in range(12)))


async def test_probes_have_no_context_variables_of_requests(
    open_runtime: OpenRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    answers = discovery.EndpointView._probe

    async def noting(self: discovery.EndpointView, member: Member) -> discovery._ProbeOutcome:
        seen.append(tenant.get())
        return await answers(self, member)

    monkeypatch.setattr(discovery.EndpointView, "_probe", noting)
    worker = await open_runtime()
    await worker.endpoint(ENDPOINT).start_serving(refuse)
    client = await client_of(await open_runtime())

    async def ask() -> None:
        tenant.set("mine")
        member = next(iter(client._view))
        client._view.mark_down(member, NoInstances("for the test"))

    await asyncio.create_task(ask())
    await until(lambda: bool(seen))
    assert set(seen) == {"none"}
    with suppress(PlaneError):
        await read_all(await client.round_robin(None))
