"""Calls start when they are made: they need not be awaited, and are asyncio futures."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from dynamo_redis.errors import HandlerFailed, InvalidRequest, NoInstances
from dynamo_redis.runtime import Client, Context, DistributedRuntime, UnaryClient, serve_unary_endpoint

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]

ENDPOINT = "dynamo.backend.generate"


async def until(condition: Callable[[], bool], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class Worker:
    """A handler that does as the request says, and records its requests and actions."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.done: list[Any] = []
        self.ids: list[str] = []
        self.runtime: DistributedRuntime

    @property
    def in_flight_count(self) -> int:
        server = self.runtime._server
        assert server is not None
        return server.in_flight_count

    async def handle(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.asked.append(request)
        self.ids.append(context.id())
        await asyncio.sleep(0.01)
        self.done.append(request)
        if request == "raise":
            raise KeyError(request)
        if request == "refuse":
            raise InvalidRequest(request)
        for item in request if isinstance(request, list) else [request]:
            yield item


@pytest.fixture
async def worker(open_runtime: OpenRuntime) -> Worker:
    made = Worker()
    made.runtime = await open_runtime()
    await made.runtime.endpoint(ENDPOINT).start_serving(made.handle)
    return made


@pytest.fixture
async def client(open_runtime: OpenRuntime, worker: Worker) -> Client:
    client = await (await open_runtime()).endpoint(ENDPOINT).client()
    await client.wait_for_instances(20)
    return client


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def test_calls_are_futures(client: Client) -> None:
    calls = [
        client.generate(1, annotated=False),
        client.round_robin(1, annotated=False),
        client.random(1, annotated=False),
        client.p2c(1, annotated=False),
        client.least_loaded(1, annotated=False),
        client.direct(1, client.instance_ids()[0], annotated=False),
    ]
    done, _ = await asyncio.wait(calls, timeout=20)
    assert [await collect(call.result()) for call in done] == [[1]] * 6


@pytest.mark.parametrize("is_connected", [True, False])
async def test_dropped_call_is_sent_nevertheless(
    client: Client, worker: Worker, *, is_connected: bool
) -> None:
    """It runs to its first item, on a new connection, too; and no state of it is left."""
    if is_connected:
        await collect(await client.round_robin(0, annotated=False))
    not_awaited, not_read = list(range(1000)), list(range(1, 1001))  # more than the window of a reader
    client.round_robin(not_awaited)
    await client.round_robin(not_read)
    gc.collect()
    await until(lambda: not_awaited in worker.done and not_read in worker.done)
    await until(lambda: not worker.in_flight_count)
    assert await collect(await client.round_robin("next", annotated=False)) == ["next"]


async def test_endpoint_is_served_without_an_await(open_runtime: OpenRuntime) -> None:
    worker, runtime, caller = Worker(), await open_runtime(), await open_runtime()
    runtime.endpoint(ENDPOINT).serve_endpoint(worker.handle)
    gc.collect()
    client = await caller.endpoint(ENDPOINT).client()
    await client.wait_for_instances(20)
    assert await collect(await client.round_robin(1, annotated=False)) == [1]
    leaving = runtime.endpoint(ENDPOINT).unregister_endpoint_instance()
    await until(leaving.done)
    await until(lambda: client.instance_ids() == [])
    runtime.endpoint(ENDPOINT).register_endpoint_instance()
    await until(lambda: client.instance_ids() == [runtime.instance_id])


async def test_error_that_is_not_awaited_is_logged(client: Client) -> None:
    said: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: said.append(repr(about["exception"])))
    client.direct(1, 12345)
    client.round_robin(object())
    gc.collect()
    assert len(said) == 2
    assert said[0].startswith("NoInstances")
    assert said[1].startswith("TypeError")


async def test_errors_are_raised_where_they_are_awaited(client: Client) -> None:
    unknown, unsendable = client.direct(1, 12345), client.round_robin(object())
    with pytest.raises(NoInstances):
        await unknown
    with pytest.raises(TypeError):
        await unsendable


async def test_errors_of_handlers_are_value_errors(client: Client) -> None:
    for request, kind in (("raise", HandlerFailed), ("refuse", InvalidRequest)):
        with pytest.raises(ValueError, match=request) as caught:
            await collect(await client.round_robin(request, annotated=False))
        assert type(caught.value) is kind


async def test_bare_context_has_one_id_on_both_sides(client: Client, worker: Worker) -> None:
    contexts = [Context(), Context(), Context("given")]
    for context in contexts:
        await collect(await client.round_robin(1, context=context))
    assert worker.ids == [context.id() for context in contexts]
    assert len(set(worker.ids)) == 3


async def test_none_is_an_annotated_item_only(client: Client) -> None:
    items = [None, {"a": None}, None]
    assert await collect(await client.round_robin(items, annotated=False)) == [{"a": None}]
    annotated = await collect(await client.round_robin(items))
    assert [item.data() for item in annotated] == items
    assert {item.comments() for item in annotated} == {None}


async def test_sets_arrive_as_lists(client: Client, worker: Worker) -> None:
    assert await collect(await client.round_robin({"of": {1}}, annotated=False)) == [{"of": [1]}]
    assert worker.asked == [{"of": [1]}]
    assert await collect(await client.round_robin(frozenset((7,)), annotated=False)) == [7]


async def test_unary_answer_may_be_none(open_runtime: OpenRuntime) -> None:
    runtime = await open_runtime()

    async def nothing(_: Any, *, context: Context) -> None:
        assert context.id() == "unary"

    serving = asyncio.ensure_future(serve_unary_endpoint(runtime.endpoint(ENDPOINT), nothing))
    client = await runtime.endpoint(ENDPOINT).client()
    await client.wait_for_instances(20)
    assert await UnaryClient(client).complete(1, context=Context("unary")) is None
    runtime.shutdown()
    await serving


async def test_end_of_a_request_is_a_future(client: Client) -> None:
    context = Context()
    first, second = context.async_killed_or_stopped(), context.async_killed_or_stopped()
    assert not (await asyncio.wait([first, second], timeout=0.01))[0]
    second.cancel()
    context.stop_generating()
    assert await first is True
    assert await context.async_killed_or_stopped() is True
    assert second.cancelled()


async def test_arguments_of_later_releases_are_named(
    dynamo_redis_url: str, dynamo_redis_prefix: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    monkeypatch.setenv("DYN_REDIS_PREFIX", dynamo_redis_prefix)
    caplog.set_level("INFO", "dynamo_redis")
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(
        loop, "etcd", "tcp", None, event_plane="zmq", response_plane="quic", color="red"
    )
    async with runtime:
        runtime.endpoint(ENDPOINT).serve_endpoint(Worker().handle, priority=1)
    text = " ".join(caplog.messages)
    for named in (
        "discovery_backend='etcd'",
        "event_plane='zmq'",
        "response_plane='quic'",
        "color",
        "priority",
    ):
        assert named in text
    assert runtime.settings.events.event_plane == "stream"
