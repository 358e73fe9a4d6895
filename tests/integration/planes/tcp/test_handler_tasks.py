"""The tasks that run handlers: each handler has its own, and a task's end is the end of its request."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_redis.errors import HandlerFailed
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from tests.integration.planes.tcp.test_plane import running_server, settings
from tests.tcp_plane import INSTANCE, SECRET, eventually

said: contextvars.ContextVar[str] = contextvars.ContextVar("said", default="nothing")


async def ask(client: TcpClient, server: TcpServer, subject: str, request: Any = None) -> list[Any]:
    target = Target(instance_id=INSTANCE, address=server.address, subject=subject, secret=SECRET)
    return [item async for item in client.open(target, request, None)]


def cancel_at_once(loop: asyncio.AbstractEventLoop, coro: Any, **more: Any) -> asyncio.Task[Any]:
    """A task factory that cancels a handler's task before its first step, as code with `all_tasks()` can."""
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **more)
    if getattr(coro, "__qualname__", "") == "Request.run":
        task.cancel()
    return task


async def test_early_cancellation_ends_the_request() -> None:
    loop = asyncio.get_running_loop()
    client = TcpClient(settings())
    async with running_server() as server:
        loop.set_task_factory(cancel_at_once)
        try:
            with pytest.raises(HandlerFailed, match="cancelled"):
                await asyncio.wait_for(ask(client, server, "echo"), 30)
        finally:
            loop.set_task_factory(None)
        await eventually(lambda: server.in_flight_count == 0, 10)
        assert await ask(client, server, "echo", 1) == [1]
        await client.aclose()


async def test_handlers_have_tasks_of_their_own() -> None:
    tasks: set[asyncio.Task[Any] | None] = set()

    async def handler(_: Any, __: Context) -> str:
        tasks.add(asyncio.current_task())
        before = said.get()
        said.set("something")
        return before

    client = TcpClient(settings())
    async with running_server() as server:
        server.register("say", handler)
        answers = await asyncio.gather(*(ask(client, server, "say") for _ in range(20)))
        assert answers == [["nothing"]] * 20
        assert len(tasks) == 20
        assert None not in tasks
        await client.aclose()


async def test_queued_request_starts_without_another_ones_variables() -> None:
    """A waiting handler starts in the step in which another request ends."""
    seen: list[str] = []

    async def handler(request: str, _: Context) -> None:
        seen.append(said.get())
        said.set(request)
        await asyncio.sleep(0.01)

    client = TcpClient(settings())
    async with running_server(max_in_flight_count=1) as server:
        server.register("say", handler)
        async with asyncio.timeout(20):
            await asyncio.gather(*(ask(client, server, "say", str(number)) for number in range(4)))
        assert seen == ["nothing"] * 4
        await client.aclose()


async def test_cancellation_callbacks_leave_no_variables_behind() -> None:
    started = asyncio.Event()

    async def watching(_: Any, context: Context) -> None:
        context.on_cancel(lambda _: note())
        started.set()
        await asyncio.sleep(60)

    def note() -> None:
        said.set("watcher")

    async def say(_: Any, __: Context) -> str:
        return said.get()

    client = TcpClient(settings())
    async with running_server() as server:
        server.register("watching", watching)
        server.register("say", say)
        target = Target(instance_id=INSTANCE, address=server.address, subject="watching", secret=SECRET)
        stream = client.open(target, None, None)
        await asyncio.wait_for(started.wait(), 30)
        await stream.aclose()
        assert await ask(client, server, "say") == ["nothing"]
        await client.aclose()


async def test_messages_are_made_in_their_callers_variables() -> None:
    """Also for a request that waited for a connection which another request had dialled."""
    client = TcpClient(settings())
    received: dict[str, list[Any]] = {}

    async def take(messages: Any, _: Context) -> list[Any]:
        return [message async for message in messages]

    async def send(name: str) -> None:
        said.set(name)

        async def messages() -> AsyncIterator[str]:
            yield said.get()

        received[name] = await anext(client.open(target, "first", None, messages=messages()))

    async with running_server() as server:
        server.register("take", take, request_stream=True)
        target = Target(instance_id=INSTANCE, address=server.address, subject="take", secret=SECRET)
        async with asyncio.timeout(20):
            await asyncio.gather(*(asyncio.create_task(send(name)) for name in "abc"))
        assert received == {name: ["first", name] for name in "abc"}
        await client.aclose()
