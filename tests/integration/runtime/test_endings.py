"""The endings of a call: the worker learns of each at once, and no state of the call is left."""

from __future__ import annotations

import ast
import asyncio
import gc
import os
import random
import re
import signal
import sys
import time
import weakref
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.errors import ConnectionLost, DeadlineExceeded, HandlerFailed, Overloaded, RequestCancelled
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.runtime import Call, Client, Context, DistributedRuntime
from tests.processes import PROGRAMS

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]

ENDPOINT = "dynamo.backend.generate"

CALLER = PROGRAMS / "long_caller.py"


async def until(condition: Callable[[], bool], within_s: float = 5) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class Worker:
    """A handler that counts up to the request, an item a tick, and ends early when it is stopped."""

    def __init__(self, runtime: DistributedRuntime) -> None:
        self.runtime = runtime
        self.contexts: list[Context] = []
        self.running_count = 0

    async def count(self, request: int, context: Context) -> AsyncIterator[Any]:
        if request < 0:
            raise ValueError("a negative number")
        self.contexts.append(context)
        self.running_count += 1
        try:
            for number in range(request):
                if context.is_stopped():
                    yield "stopped"
                    return
                yield number
                await asyncio.sleep(0.001)
        finally:
            self.running_count -= 1

    @property
    def server(self) -> TcpServer:
        server = self.runtime._server
        assert isinstance(server, TcpServer)
        return server


@pytest.fixture
async def worker(open_runtime: OpenRuntime) -> Worker:
    return await started(open_runtime)


async def started(open_runtime: OpenRuntime, **overrides: Any) -> Worker:
    worker = Worker(await open_runtime(**overrides))
    await worker.runtime.endpoint(ENDPOINT).start_serving(worker.count)
    return worker


async def client_of(runtime: DistributedRuntime, count: int) -> Client:
    client = await runtime.endpoint(ENDPOINT).client()
    await until(lambda: len(client.instance_ids()) == count)
    return client


async def test_stop_ends_both_sides_without_an_error(open_runtime: OpenRuntime, worker: Worker) -> None:
    client = await client_of(await open_runtime(), 1)
    context = Context()
    call = await client.round_robin(100_000, annotated=False, context=context)
    assert await anext(call) == 0
    context.stop_generating()
    assert [item async for item in call] == []
    await until(lambda: worker.contexts[0].is_stopped() and not worker.running_count)


async def test_kill_ends_both_sides(open_runtime: OpenRuntime, worker: Worker) -> None:
    client = await client_of(await open_runtime(), 1)
    context = Context()
    call = await client.round_robin(100_000, annotated=False, context=context)
    assert await anext(call) == 0
    context.kill()
    with pytest.raises(RequestCancelled):
        await anext(call)
    await until(lambda: worker.contexts[0].is_killed() and not worker.running_count)


async def test_deadline_ends_both_sides_and_is_final(open_runtime: OpenRuntime, worker: Worker) -> None:
    other = await started(open_runtime)
    client = await client_of(await open_runtime(), 2)
    call = await client.round_robin(100_000, False, Context(deadline=time.monotonic() + 0.2))
    with pytest.raises(DeadlineExceeded):
        await exhaust(call)
    contexts = [*worker.contexts, *other.contexts]
    assert len(contexts) == 1
    await until(lambda: contexts[0].is_killed() and not worker.running_count + other.running_count)


async def test_left_loop_ends_the_call_with_its_last_reference(
    open_runtime: OpenRuntime, worker: Worker, no_collection: None
) -> None:
    client = await client_of(await open_runtime(), 1)
    call = await client.round_robin(100_000, annotated=False)
    async for _ in call:
        break
    await exhaust(await client.round_robin(1, annotated=False))  # on the same connection, after any kill
    assert not worker.contexts[0].is_killed()
    del call
    await until(lambda: worker.contexts[0].is_killed() and not worker.running_count)


async def test_left_block_ends_the_call_at_once(open_runtime: OpenRuntime, worker: Worker) -> None:
    client = await client_of(await open_runtime(), 1)
    async with await client.round_robin(100_000, annotated=False) as call:
        async for _ in call:
            break
    await until(lambda: worker.contexts[0].is_killed() and not worker.running_count)
    assert [item async for item in call] == []


async def test_page_describes_the_endings_of_calls(open_runtime: OpenRuntime, repository: Path) -> None:
    page = (repository / "docs" / "python-api" / "runtime.md").read_text(encoding="utf-8")
    found = re.search(r"## What a call promises.*?```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    contexts: list[Context] = []

    async def say(request: str, context: Context) -> AsyncIterator[Any]:
        contexts.append(context)
        yield request
        yield "stop"
        left_s = context.remaining_s()
        if left_s is None:
            await context.async_killed_or_stopped()
        yield left_s

    await (await open_runtime()).endpoint(ENDPOINT).start_serving(say)
    names: dict[str, Any] = {
        "client": await client_of(await open_runtime(), 1),
        "request": "go",
        "time": time,
        "Context": Context,
        "DeadlineExceeded": DeadlineExceeded,
    }
    code = compile(found[1], "runtime.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, names)
    assert names["word"] == "stop"
    await until(lambda: contexts[0].is_killed())
    assert names["words"][:2] == ["go", "stop"]
    assert 0 < names["words"][2] <= 5


async def test_killed_caller_ends_its_requests(
    worker: Worker, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    environment = os.environ | {"DYN_REDIS_URL": dynamo_redis_url, "DYN_REDIS_PREFIX": dynamo_redis_prefix}
    caller = await asyncio.create_subprocess_exec(
        sys.executable, CALLER, ENDPOINT, env=environment, stdout=PIPE
    )
    try:
        assert caller.stdout is not None
        assert await caller.stdout.readline() == b"answered\n"
        assert worker.running_count == 1
    finally:
        caller.send_signal(signal.SIGKILL)
        await caller.communicate()
    await until(lambda: worker.contexts[0].is_killed() and not worker.running_count)


async def exhaust(call: Call) -> None:
    async for _ in call:
        pass


async def end_somehow(client: Client, rng: random.Random) -> str:
    """Make a call and end it in a random way; return the way."""
    way = rng.choice(("read", "leave", "close", "drop", "cancel", "kill", "stop", "late", "fail"))
    context = Context(deadline=time.monotonic() + rng.random() / 50) if way == "late" else Context()
    choose = rng.choice((client.round_robin, client.p2c, client.least_loaded, client.random))
    call = await choose(-1 if way == "fail" else rng.choice((1, 3, 60)), False, context)
    if way == "drop":
        return way
    if way == "close":
        await call.aclose()
        return way
    loop = asyncio.get_running_loop()
    if way in ("kill", "stop"):
        loop.call_later(rng.random() / 50, context.kill if way == "kill" else context.stop_generating)
    elif way == "cancel":
        reading = asyncio.ensure_future(exhaust(call))
        loop.call_later(rng.random() / 50, reading.cancel)
        with suppress(asyncio.CancelledError):
            await reading
        return way
    async for _ in call:
        if way == "leave":
            break
    return way


async def test_two_thousand_calls_leave_no_state(open_runtime: OpenRuntime) -> None:
    workers = [await started(open_runtime, max_in_flight_count=24, max_queued_count=4) for _ in range(2)]
    caller = await open_runtime()
    client = await client_of(caller, 2)
    rng = random.Random(7)
    ends: Counter[str] = Counter()

    async def some() -> None:
        for _ in range(32):
            try:
                ends[await end_somehow(client, rng)] += 1
            except (DeadlineExceeded, HandlerFailed, Overloaded, RequestCancelled) as exc:
                ends[exc.code] += 1

    async with asyncio.timeout(90):
        await asyncio.gather(*(some() for _ in range(64)))
    assert sum(ends.values()) == 2048
    assert {DeadlineExceeded.code, HandlerFailed.code, RequestCancelled.code} <= ends.keys()
    plane_client = caller._plane_client
    assert isinstance(plane_client, TcpClient)
    assert plane_client.pending_count == 0
    assert [(member.in_flight, len(member.pending)) for member in client._view] == [(0, 0), (0, 0)]
    await until(lambda: not any(worker.server.in_flight_count or worker.running_count for worker in workers))
    for worker in workers:
        assert not any(connection.streams for connection in worker.server._connections)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Turn the garbage collector off: dropped objects must be freed by their reference counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_dropped_call_is_killed_after_it_was_sent_again(
    open_runtime: OpenRuntime, worker: Worker, no_collection: None
) -> None:
    """No reference to the call is left in its first failure."""
    other = await started(open_runtime)
    client = await client_of(await open_runtime(), 2)
    await other.server.drain(0)
    for _ in range(4):
        call = await client.round_robin(100_000, annotated=False)
        assert await anext(call) == 0
        del call
        await until(lambda: all(context.is_killed() for context in worker.contexts))
    assert len(worker.contexts) == 4


async def test_handled_error_keeps_no_object_alive(
    open_runtime: OpenRuntime, worker: Worker, no_collection: None
) -> None:
    client = await client_of(await open_runtime(), 1)

    async def failing() -> weakref.ref[HandlerFailed]:
        try:
            await exhaust(await client.round_robin(-1))
        except HandlerFailed as exc:
            return weakref.ref(exc)
        raise AssertionError("it did not fail")

    assert (await failing())() is None


async def test_requests_that_end_together_have_errors_of_their_own(
    open_runtime: OpenRuntime, worker: Worker
) -> None:
    """A shared error would collect the tracebacks of all."""
    client = await client_of(await open_runtime(), 1)
    calls = [await client.round_robin(100_000, annotated=False) for _ in range(5)]
    assert [await anext(call) for call in calls] == [0] * 5
    await worker.server.aclose()
    errors = await asyncio.gather(*map(exhaust, calls), return_exceptions=True)
    assert all(isinstance(error, ConnectionLost) for error in errors)
    assert len(set(map(id, errors))) == 5
