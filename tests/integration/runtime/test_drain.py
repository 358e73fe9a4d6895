"""A worker that leaves: its callers see no error, or one that names the remedy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from dynamo_redis.errors import Draining, NoInstances, PlaneError
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.runtime import Client, Context, DistributedRuntime

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]

ENDPOINT = "dynamo.backend.generate"


async def until(condition: Callable[[], bool], within_s: float = 5) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


class Worker:
    """A runtime whose handler answers with its name, and waits before a second item until it is released."""

    def __init__(self, name: str, runtime: DistributedRuntime) -> None:
        self.name = name
        self.runtime = runtime
        self.may_go = asyncio.Event()
        self.contexts: list[Context] = []

    async def handle(self, request: str, context: Context) -> AsyncIterator[Any]:
        """`quick`: one item at once; `slow`: one, held back; `begun`: one at once, another one held back."""
        self.contexts.append(context)
        if request == "slow":
            await self.may_go.wait()
        yield self.name
        if request == "begun":
            await self.may_go.wait()
            yield "the rest"

    async def serve(self) -> Worker:
        await self.runtime.endpoint(ENDPOINT).start_serving(self.handle)
        return self

    @property
    def server(self) -> TcpServer:
        server = self.runtime._server
        assert isinstance(server, TcpServer)
        return server

    def leave(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.runtime.aclose())


def plane_client_of(runtime: DistributedRuntime) -> TcpClient:
    plane_client = runtime._plane_client
    assert isinstance(plane_client, TcpClient)
    return plane_client


@pytest.fixture
def start_worker(open_runtime: OpenRuntime) -> Callable[..., Awaitable[Worker]]:
    async def start(name: str, **overrides: Any) -> Worker:
        return await Worker(name, await open_runtime(**overrides)).serve()

    return start


StartWorker = Callable[..., Awaitable[Worker]]


async def client_of(runtime: DistributedRuntime, *workers: Worker) -> Client:
    """Return a client that knows these workers."""
    client = await runtime.endpoint(ENDPOINT).client()
    await until(lambda: {worker.runtime.instance_id for worker in workers} <= set(client.instance_ids()))
    return client


async def first(client: Client, request: str, **options: Any) -> Any:
    (item,) = await collect(await client.round_robin(request, annotated=False, **options))
    return item


async def test_callers_learn_of_a_drain_before_requests_end(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    """GOAWAY is sent at the start of a drain: a caller without a request there closes its connection at
    once."""
    a = await start_worker("a")
    busy = await client_of(await open_runtime(), a)
    idle_runtime = await open_runtime()
    idle = await client_of(idle_runtime, a)
    assert await first(idle, "quick") == "a"
    call = await busy.round_robin("begun", annotated=False)
    assert await anext(call) == "a"
    leaving = a.leave()
    await until(lambda: plane_client_of(idle_runtime).connection_count == 0)
    assert not leaving.done()
    a.may_go.set()
    assert await collect(call) == ["the rest"]
    await leaving


async def test_queued_request_is_sent_elsewhere_at_a_drain(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    a = await start_worker("a", max_in_flight_count=1, drain_s=30)
    caller = await open_runtime()
    client = await client_of(caller, a)
    handled = asyncio.create_task(first(client, "slow"))
    await until(lambda: len(a.contexts) == 1)
    queued = [asyncio.create_task(first(client, "quick")) for _ in range(5)]
    await until(lambda: a.server.in_flight_count == 6)
    await client_of(caller, await start_worker("b"))
    leaving = a.leave()
    async with asyncio.timeout(30):
        assert await asyncio.gather(*queued) == ["b"] * 5
    assert not handled.done()
    a.may_go.set()
    assert await handled == "a"
    await leaving
    assert len(a.contexts) == 1


async def test_request_without_a_connection_is_sent_elsewhere(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    """The caller has no connection yet, and learns in the handshake that the worker is leaving."""
    a, b = await start_worker("a"), await start_worker("b")
    caller = await open_runtime()
    client = await client_of(caller, a, b)
    await a.server.drain(1)  # its record is still registered
    calls = [await client.round_robin("quick", annotated=False) for _ in range(10)]
    assert plane_client_of(caller).pending_count == 10
    assert [await collect(call) for call in calls] == [["b"]] * 10
    assert a.contexts == []


async def test_half_sent_request_is_sent_elsewhere(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    a, b = await start_worker("a"), await start_worker("b")
    client = await client_of(await open_runtime(), a, b)
    begun = await client.direct("begun", b.runtime.instance_id, annotated=False)
    assert await anext(begun) == "b"
    call = await client.least_loaded("x" * (30 << 20), annotated=False)
    sending = asyncio.ensure_future(anext(call))
    async with asyncio.timeout(30):
        while not any(connection.decoder.in_raw_payload for connection in a.server._connections):
            await asyncio.sleep(0)
    await a.server.drain(5)
    assert await sending == "b"
    assert a.contexts == []
    b.may_go.set()
    assert await collect(begun) == ["the rest"]


async def test_requests_after_the_grace_move_or_fail(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    """The retry has the rest of the request's time, not a new deadline."""
    a = await start_worker("a", drain_s=0.5)
    caller = await open_runtime()
    client = await client_of(caller, a)
    context = Context(deadline=time.monotonic() + 30)
    unanswered = await client.round_robin("slow", annotated=False, context=context)
    begun = await client.round_robin("begun", annotated=False)
    assert await anext(begun) == "a"
    await until(lambda: len(a.contexts) == 2)
    b = await start_worker("b")
    await client_of(caller, a, b)
    b.may_go.set()
    await a.leave()
    assert await collect(unanswered) == ["b"]
    remaining_s = b.contexts[0].remaining_s()
    assert remaining_s is not None
    assert remaining_s < 29.7
    with pytest.raises(Draining, match="before the request was finished") as caught:
        await anext(begun)
    assert caught.value.retryable
    assert all(context.is_killed() for context in a.contexts)


async def test_client_of_one_worker_learns_at_once_that_it_leaves(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    a = await start_worker("a")
    client = await client_of(await open_runtime(), a)
    call = await client.round_robin("begun", annotated=False)
    assert await anext(call) == "a"
    leaving = a.leave()
    await until(lambda: a.server._draining)
    async with asyncio.timeout(30):
        for _ in range(20):
            with pytest.raises((Draining, NoInstances)):
                await first(client, "quick")
            await asyncio.sleep(0.005)
    a.may_go.set()
    assert await collect(call) == ["the rest"]
    await leaving
    await until(lambda: client.instance_ids() == [])
    with pytest.raises(NoInstances):
        await client.round_robin("quick")


async def test_request_stream_is_read_to_its_end_in_a_drain(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    a = await start_worker("a")
    caller = await open_runtime()
    client = await client_of(caller, a)
    received_count = 0

    async def total(messages: AsyncIterator[int], _: Context) -> int:
        nonlocal received_count
        result = 0
        async for message in messages:
            received_count += 1
            result += message
        return result

    a.server.register("total", total, request_stream=True)
    more = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        await more.wait()
        for number in range(2, 1001):
            yield number

    (instance,) = client.instances()
    target = instance.target("tcp")
    assert target is not None
    target = type(target)(target.instance_id, target.address, "total", target.secret)
    stream = plane_client_of(caller).open(target, 0, Context(), messages=source())
    await until(lambda: received_count == 2)
    leaving = a.leave()
    await until(lambda: a.server._draining)
    more.set()
    assert await collect(stream) == [500_500]
    await leaving


async def test_idle_worker_leaves_at_once(open_runtime: OpenRuntime, start_worker: StartWorker) -> None:
    """The shutdown may take longer, and callers are connected."""
    a = await start_worker("a", drain_s=60)
    client = await client_of(await open_runtime(), a)
    assert await first(client, "quick") == "a"
    async with asyncio.timeout(30):
        await a.leave()


async def test_endpoint_without_graceful_shutdown_ends_at_once(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    a = await start_worker("a", drain_s=30)
    abrupt = a.runtime.endpoint("dynamo.backend.abrupt")
    await abrupt.start_serving(a.handle, graceful_shutdown=False)
    caller = await open_runtime()
    client = await client_of(caller, a)
    other = await caller.endpoint(str(abrupt.name)).client()
    await other.wait_for_instances(5)
    graceful, ended = [await c.round_robin("begun", annotated=False) for c in (client, other)]
    assert [await anext(graceful), await anext(ended)] == ["a", "a"]
    leaving = a.leave()
    with pytest.raises(PlaneError):
        await anext(ended)
    assert not leaving.done()
    a.may_go.set()
    assert await collect(graceful) == ["the rest"]
    await leaving


async def test_shutdown_has_one_deadline(
    open_runtime: OpenRuntime, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time spent on one endpoint is not given to the others again."""
    a = await start_worker("a", drain_s=0.4)
    first_endpoint = a.runtime.endpoint("dynamo.backend.first")
    serving = asyncio.ensure_future(first_endpoint.serve_endpoint(a.handle))
    caller = await open_runtime()
    client = await client_of(caller, a)
    other = await caller.endpoint(str(first_endpoint.name)).client()
    await other.wait_for_instances(10)
    calls = [await c.round_robin("begun", annotated=False) for c in (client, other)]
    assert [await anext(call) for call in calls] == ["a", "a"]
    graces_s: list[float] = []
    drain = a.server.drain

    async def noted(grace_s: float) -> None:
        graces_s.append(grace_s)
        await drain(grace_s)

    monkeypatch.setattr(a.server, "drain", noted)
    a.runtime.shutdown()
    await serving
    await a.leave()
    assert graces_s == [0.0]
    for call in calls:
        with pytest.raises(Draining):
            await anext(call)
