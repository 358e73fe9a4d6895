"""The ends of bidirectional requests: as those of other calls, whatever the caller does with the answer."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from dynamo_redis.errors import HandlerFailed
from dynamo_redis.runtime import Client, DistributedRuntime, PyAsyncRequestStream
from tests.tcp_plane import eventually

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]

ENDPOINT = "dynamo.backend.generate"


class Worker:
    """Echoes the messages of each request, and counts requests that have begun and that have ended."""

    def __init__(self) -> None:
        self.begun_count = self.ended_count = 0

    async def handle(self, request_stream: PyAsyncRequestStream) -> AsyncIterator[str | None]:
        self.begun_count += 1
        try:
            async for message in request_stream:
                if message == "raise":
                    raise KeyError(message)
                yield message
        finally:
            self.ended_count += 1


async def lasting(*messages: str | None) -> AsyncIterator[str | None]:
    """Send messages, and keep the stream of them open."""
    for message in messages:
        yield message
    await asyncio.Event().wait()


@pytest.fixture
async def worker(open_runtime: OpenRuntime) -> AsyncIterator[Worker]:
    made, runtime = Worker(), await open_runtime()
    serving = runtime.endpoint(ENDPOINT).serve_bidirectional_endpoint(made.handle)
    yield made
    runtime.shutdown()
    await serving


@pytest.fixture
async def client(open_runtime: OpenRuntime, worker: Worker) -> Client:
    client = await (await open_runtime()).endpoint(ENDPOINT).client()
    await client.wait_for_instances(20)
    return client


def under_way_count(client: Client) -> int:
    return sum(member.in_flight for member in client._view)


async def test_unread_answer_that_is_dropped_ends(client: Client, worker: Worker) -> None:
    answer = await client.bidirectional(lasting("a"))
    await eventually(lambda: worker.begun_count)
    assert under_way_count(client) == 1
    del answer
    gc.collect()
    await eventually(lambda: worker.ended_count)
    await eventually(lambda: not under_way_count(client))


async def test_answer_dropped_before_it_is_sent_ends(client: Client, worker: Worker) -> None:
    await client.bidirectional(lasting("a"))
    gc.collect()
    await eventually(lambda: not under_way_count(client))
    await eventually(lambda: worker.begun_count == worker.ended_count == 1)


async def test_half_read_answer_that_is_dropped_ends(client: Client, worker: Worker) -> None:
    answer = await client.bidirectional(lasting("a", "b"), annotated=False)
    assert await anext(answer) == "a"
    del answer
    gc.collect()
    await eventually(lambda: worker.ended_count)
    await eventually(lambda: not under_way_count(client))


async def test_closed_answer_ends(client: Client, worker: Worker) -> None:
    async with await client.bidirectional(lasting("a", None, "b"), annotated=False) as answer:
        assert [await anext(answer), await anext(answer)] == ["a", "b"]
    await eventually(lambda: worker.ended_count)
    assert not under_way_count(client)


async def test_failed_request_is_not_repeated(client: Client, worker: Worker) -> None:
    answer = await client.bidirectional(lasting("raise"))
    with pytest.raises(HandlerFailed, match="KeyError"):
        await anext(answer)
    assert worker.begun_count == 1
    assert not under_way_count(client)
