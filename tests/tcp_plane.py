"""Shared parts of the tests of the tcp plane: a server with common handlers, and a client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer

SECRET: Final = b"a secret of the instance, random"
INSTANCE: Final = 7

both_loops = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    ],
)


async def eventually(condition: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait until the condition holds; fail after `within_s`."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.005)


async def echo(request: Any, _: Context) -> Any:
    """Answer with the request."""
    return request


async def large(request: int, _: Context) -> bytes:
    """Answer with `request` zero bytes."""
    return bytes(request)


async def count(request: int, context: Context) -> AsyncIterator[int]:
    """Answer with the numbers below `request`, then wait until the request is stopped."""
    for number in range(request):
        yield number
    await context.async_killed_or_stopped()


async def wait(_: Any, context: Context) -> AsyncIterator[int]:
    """Answer with 1; with 2 once the request is stopped."""
    yield 1
    await context.async_killed_or_stopped()
    yield 2


async def hang(_: Any, __: Context) -> None:
    """Give no answer."""
    await asyncio.sleep(60)


async def total(messages: AsyncIterator[Any], context: Context) -> int:
    """Answer a request stream with the count of its messages, once it is stopped."""
    found = len([message async for message in messages])
    await context.async_killed_or_stopped()
    return found


async def unread(_: AsyncIterator[Any], context: Context) -> None:
    """Read no message of a request stream, until it is stopped."""
    await context.async_killed_or_stopped()


HANDLERS: Final[dict[str, Handler]] = {
    "echo": echo,
    "small": echo,
    "large": large,
    "count": count,
    "wait": wait,
    "hang": hang,
}
STREAM_HANDLERS: Final[dict[str, Handler]] = {"total": total, "unread": unread}


@asynccontextmanager
async def running_server(**settings: Any) -> AsyncIterator[TcpServer]:
    """Run a server with the handlers above, on loopback unless the settings name another host."""
    chosen = PlaneSettings.load(**{"tcp_host": "127.0.0.1", **settings})
    server = TcpServer(chosen, secret=SECRET, instance_id=INSTANCE)
    for subject, handler in HANDLERS.items():
        server.register(subject, handler)
    for subject, handler in STREAM_HANDLERS.items():
        server.register(subject, handler, request_stream=True)
    await server.start()
    try:
        yield server
    finally:
        await server.aclose()


@asynccontextmanager
async def running_client(**settings: Any) -> AsyncIterator[TcpClient]:
    """Make a client, and close it at the end."""
    client = TcpClient(PlaneSettings.load(**settings))
    try:
        yield client
    finally:
        await client.aclose()
