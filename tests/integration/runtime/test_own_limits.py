"""Limits of the caller's process: the bytes that it may hold, and an answer dropped in another thread."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from dynamo_redis.errors import PayloadBudgetExceeded
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.runtime.client import Client
from tests.integration.conftest import OpenRuntime
from tests.integration.runtime.test_runtime import until

ENDPOINT = "test.limits.answer"
LARGE_BYTES = 1200 << 10


async def client_of(runtime: DistributedRuntime, count: int) -> Client:
    client = await runtime.endpoint(ENDPOINT).client()
    await until(lambda: len(client.instance_ids()) == count)
    return client


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def test_full_own_budget_repeats_no_request(open_runtime: OpenRuntime) -> None:
    runs: list[str] = []

    async def answer(request: str) -> AsyncIterator[bytes]:
        runs.append(request)
        for _ in range(2):
            yield bytes(LARGE_BYTES)

    for _ in range(3):
        await (await open_runtime()).endpoint(ENDPOINT).start_serving(answer)
    caller = await open_runtime(max_payload_in_flight_bytes=4 << 20)
    client = await client_of(caller, 3)
    unread = [await client.round_robin("unread", annotated=False) for _ in range(3)]
    plane = caller._plane_client
    assert isinstance(plane, TcpClient)
    await until(lambda: plane.payload_bytes > 3 << 20)
    with pytest.raises(PayloadBudgetExceeded, match="DYN_TCP_MAX_PAYLOAD_BYTES_IN_FLIGHT"):
        async for _ in await client.round_robin("new", annotated=False):
            pass
    assert runs.count("new") == 1
    assert len(client.instance_ids()) == 3
    for call in unread:
        await call.aclose()
    assert [len(item) async for item in await client.round_robin("new", annotated=False)] == [LARGE_BYTES] * 2


async def test_answer_dropped_in_a_thread_is_killed(
    open_runtime: OpenRuntime, no_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Context] = []
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: raised.append(found.exc_value))

    async def answer(_: Any, context: Context) -> AsyncIterator[int]:
        yield 0
        await context.async_killed_or_stopped()
        killed.append(context)

    await (await open_runtime()).endpoint(ENDPOINT).start_serving(answer)
    client = await client_of(await open_runtime(), 1)
    call = await client.round_robin(None, annotated=False)
    await anext(call)
    for _ in range(10):  # let the work after the answer end
        await asyncio.sleep(0)
    cycle: list[Any] = [call]
    cycle.append(cycle)
    del call, cycle
    loop = asyncio.get_running_loop()
    loop.set_debug(True)  # complains of calls from other threads
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    await until(lambda: len(killed) == 1)
    loop.set_debug(False)
    assert not raised
