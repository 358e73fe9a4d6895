"""Requests of every kind, ended at random moments in every way. Afterwards nothing is left of them.

Clients and servers are the real ones, over real sockets. Callers send requests one after the other and end
each in a way drawn at random: by reading, closing, dropping, cancelling, stopping, killing, by deadlines.
Meanwhile the weather cuts connections, moves endpoints, drains servers and closes clients.

Each caller draws from a generator of its own, so a seed always makes the same requests and the same ends;
what meets what in time is up to the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import stat
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import InstanceRemoved, InvalidRequest, Overloaded, PlaneError
from dynamo_redis.planes.base import ResponseStream, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames import connection as tcp_connection
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer
from tests.fuzz.watch import MemoryMark, Newcomers, complaints, contents, settled

SECRET: Final = b"a secret of the instance, random"
CALLERS: Final = 192
CLIENTS: Final = 4
SERVERS: Final = 2
WEATHER_EVERY: Final = 250
"""Count of requests after which the faults change."""
LARGE_BYTES: Final = (*[70_000] * 7, 1_000_000)
"""Sizes of payloads: most are just too large for a frame, one is larger than the buffers of a socket."""
SEND_BUFFER_BYTES: Final = 32 * 1024
HIGH_WATER_BYTES: Final = 16 * 1024
"""Unsent bytes past which connections pause their senders; low, to make it happen often."""
OBJECTS_LEFT, BLOCKS_LEFT = 60, 6_000
"""The objects that 100,000 requests may leave by caches and noise; a leak of one in a thousand is more."""

_DESCRIPTORS: Final = Path("/proc/self/fd")
_PER_REQUEST: Final = frozenset(
    {"FrameResponseStream", "Request", "RequestMessages", "Mailbox", "Sender", "Context", "_Raw"}
)


# --------------------------------------------------------------------------- what is served


async def echo(request: Any, _: Context) -> Any:
    return request


async def slow(request: Any, _: Context) -> Any:
    await asyncio.sleep(request["delay_s"])
    return request


async def count(request: Any, context: Context) -> AsyncIterator[int]:
    for number in range(request["items"]):
        if number % 5 == 4:
            await asyncio.sleep(0)
        if context.is_stopped():
            return
        yield number


async def large(request: Any, context: Context) -> AsyncIterator[bytes]:
    for _ in range(request["items"] % 4):
        yield bytes(request["size"])
        if context.is_stopped():
            return


async def deaf(request: Any, _: Context) -> AsyncIterator[int]:
    """Ignores its cancellation for a while."""
    for number in range(3):
        try:
            await asyncio.sleep(request["delay_s"])
        except asyncio.CancelledError:
            await asyncio.sleep(0.003)
        yield number


async def waits(_: Any, context: Context) -> str:
    await context.async_killed_or_stopped()
    return "stopped"


async def raises(request: Any, _: Context) -> AsyncIterator[int]:
    yield 1
    await asyncio.sleep(0)
    raise (ValueError("meant"), InvalidRequest("meant"), Overloaded("meant", 0.1))[request["items"] % 3]


async def total(messages: AsyncIterator[Any], _: Context) -> AsyncIterator[int]:
    async for _message in messages:
        yield 1


async def unread(messages: AsyncIterator[Any], _: Context) -> Any:
    """Leaves the request stream after its first message."""
    return await anext(messages)


SINGLE: Final = {f.__name__: f for f in (echo, slow, count, large, deaf, waits, raises)}
STREAMED: Final = {f.__name__: f for f in (total, unread)}
KINDS: Final = (*SINGLE, "relay", *STREAMED)
WEIGHTS: Final = (20, 10, 30, 3, 4, 8, 4, 8, 8, 5)


async def messages(number: int, size: int, *, sticks: bool) -> AsyncIterator[Any]:
    """Yield `number` messages, the second of `size` bytes; never end if `sticks`."""
    for index in range(number):
        if index % 3 == 2:
            await asyncio.sleep(0)
        yield bytes(size) if index == 1 else index
    if sticks:
        await asyncio.sleep(600)


# --------------------------------------------------------------------------- how requests end

End = Callable[["Caller", ResponseStream, Context], Awaitable[None]]


async def read_all(_: Caller, stream: ResponseStream, __: Context) -> None:
    async for _item in stream:
        pass


async def leave(caller: Caller, stream: ResponseStream, _: Context) -> None:
    async with stream:
        await caller.read_some(stream)


async def drop(caller: Caller, stream: ResponseStream, _: Context) -> None:
    """Drop an iterator that owns the stream; the event loop finalizes it."""
    iterator = owner(stream)
    await anext(iterator)  # before that it owns nothing
    await caller.read_some(iterator)
    del iterator


async def owner(stream: ResponseStream) -> AsyncGenerator[Any, None]:
    async with stream:
        async for item in stream:
            yield item


async def cancel(caller: Caller, stream: ResponseStream, context: Context) -> None:
    reader = asyncio.ensure_future(read_all(caller, stream, context))
    await caller.moment()
    reader.cancel()
    try:
        await reader
    except asyncio.CancelledError:
        pass
    finally:
        await stream.aclose()  # the reader may never have begun


async def time_out(caller: Caller, stream: ResponseStream, context: Context) -> None:
    with suppress(TimeoutError):
        async with stream, asyncio.timeout(caller.rng.random() * 0.01):
            await read_all(caller, stream, context)


async def stop(caller: Caller, stream: ResponseStream, context: Context) -> None:
    reader = asyncio.ensure_future(read_all(caller, stream, context))
    await caller.moment()
    context.stop_generating()
    await reader


async def kill(caller: Caller, stream: ResponseStream, context: Context) -> None:
    reader = asyncio.ensure_future(read_all(caller, stream, context))
    await caller.moment()
    context.kill()
    await reader


async def fail(caller: Caller, stream: ResponseStream, context: Context) -> None:
    reader = asyncio.ensure_future(read_all(caller, stream, context))
    await caller.moment()
    stream.fail(InstanceRemoved("gone"))
    await reader


async def ignore(caller: Caller, stream: ResponseStream, _: Context) -> None:
    """Close the stream without having read."""
    await caller.moment()
    await stream.aclose()


async def stop_unread(caller: Caller, stream: ResponseStream, context: Context) -> None:
    context.stop_generating()
    await caller.moment()
    context.kill()
    await read_all(caller, stream, context)


ENDS: Final[tuple[End, ...]] = (
    read_all,
    leave,
    drop,
    cancel,
    time_out,
    stop,
    kill,
    fail,
    ignore,
    stop_unread,
)
SUDDEN: Final = (cancel, time_out, kill, fail, ignore)
"""The ways to end a request that do not wait."""

DEADLINES_S: Final = (*[None] * 9, -1.0, 0.002, 0.01, 5.0)


class Caller:
    """Sends requests one after the other."""

    def __init__(self, storm: Storm, number: int) -> None:
        self.rng = random.Random(f"{storm.seed}/{number}")
        self._storm = storm
        self._number = number

    async def run(self, requests: int) -> None:
        """Send `count` requests."""
        storm = self._storm
        for _ in range(requests):
            client = storm.clients[self._number % CLIENTS]
            if self.rng.random() < 0.002:
                client.forget(storm.target(self.rng.choice(KINDS), self._number))
            await self._request(client)
            storm.on_done()

    async def _request(self, client: TcpClient) -> None:
        rng, storm = self.rng, self._storm
        [kind] = rng.choices(KINDS, WEIGHTS)
        end = rng.choice(ENDS)
        allowed_s = rng.choice(DEADLINES_S)
        if kind == "waits" and end in (read_all, drop, leave) and allowed_s in (None, 5.0):
            allowed_s = 0.02  # else it would wait for ever, as told
        context = Context(deadline=None if allowed_s is None else time.monotonic() + allowed_s)
        sticks = end in SUDDEN and rng.random() < 0.3
        options = {"messages": messages(rng.randrange(20), rng.choice((1, LARGE_BYTES[0])), sticks=sticks)}
        size = rng.choice(LARGE_BYTES)
        request: dict[str, Any] = {"items": rng.randrange(60), "delay_s": rng.random() * 0.01, "size": size}
        if rng.random() < 0.01:
            request["ballast"] = bytes(size)
        outcome = "ended"
        try:
            target = storm.target(kind, rng.randrange(SERVERS))
            stream = client.open(target, request, context, **(options if kind in STREAMED else {}))
            await end(self, stream, context)
        except (PlaneError, StopAsyncIteration) as exc:
            outcome = type(exc).__name__
        storm.outcomes[end.__name__, outcome] += 1

    async def moment(self) -> None:
        """Wait until a random moment: a few turns of the event loop, or some time."""
        if self.rng.random() < 0.6:
            for _ in range(self.rng.randrange(8)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self.rng.random() * 0.008)

    async def read_some(self, items: ResponseStream | AsyncGenerator[Any, None]) -> None:
        """Read a few items."""
        for _ in range(self.rng.randrange(6)):
            await anext(items)


# --------------------------------------------------------------------------- the whole


class Storm:
    """Servers, clients, callers, and the faults between them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.clients: list[TcpClient] = []
        self._rng = random.Random(f"{seed}/weather")
        self._servers: list[TcpServer] = []
        self._retired: list[TcpServer] = []
        self._relay: TcpClient
        self._new = Newcomers()
        self._done = 0
        self._changes: set[asyncio.Task[None]] = set()
        self.settings = PlaneSettings.load(
            channel_buffer_count=12, max_in_flight_count=80, max_queued_count=60, pool_size=3
        )

    def target(self, subject: str, server: int) -> Target:
        """Choose an endpoint of one of the servers."""
        number = server % SERVERS
        return Target(number + 1, self._servers[number].address, subject, SECRET)

    def on_done(self) -> None:
        """Count a request that has ended."""
        self._done += 1
        if self._done % WEATHER_EVERY == 0:
            self._narrow()
            change = self._rng.choice((self._cut, self._cut, self._move, self._replace, self._reopen))
            task = asyncio.ensure_future(change())
            self._changes.add(task)
            task.add_done_callback(self._changes.discard)

    async def run(self, requests: int) -> None:
        """Send the requests, wait for calm, and check that nothing is left."""
        warm_up = max(CALLERS, requests // 10)
        with complaints(), patch.object(tcp_connection, "WRITE_HIGH_WATER_BYTES", HIGH_WATER_BYTES):
            self.clients = [TcpClient(self.settings) for _ in range(CLIENTS)]
            self._relay = TcpClient(self.settings)
            try:
                self._servers = [await self._start(number) for number in range(SERVERS)]
                await self._send(warm_up)
                await self._calm()
                await self._disconnect()
                mark = MemoryMark()
                await self._send(requests - warm_up)
                await self._calm()
                await self._disconnect()
                mark.check(objects=OBJECTS_LEFT, blocks=BLOCKS_LEFT)
            finally:
                await self._close()
            await settled(lambda: not self._new.census("planes.tcp"), lambda: self._new.census("planes.tcp"))

    async def _send(self, requests: int) -> None:
        share, rest = divmod(max(0, requests), CALLERS)
        callers = (Caller(self, self._done + number) for number in range(CALLERS))
        await asyncio.gather(*(one.run(share + (n < rest)) for n, one in enumerate(callers)))
        while self._changes:
            await asyncio.wait(self._changes)

    async def _start(self, number: int) -> TcpServer:
        server = TcpServer(self.settings, secret=SECRET, instance_id=number + 1)
        await server.start()

        async def relay(request: Any, context: Context) -> AsyncIterator[Any]:
            """Passes the request and its context on."""
            async with self._relay.open(self.target("count", number + 1), request, context) as stream:
                async for item in stream:
                    yield item

        for name, handler in {**SINGLE, "relay": relay}.items():
            server.register(name, handler)
        for name, streamed in STREAMED.items():
            server.register(name, streamed, request_stream=True)
        return server

    # ------------------------------------------------------------------- weather

    def _ports(self) -> set[int]:
        return {int(server.address.rpartition(":")[2]) for server in self._servers}

    def _narrow(self) -> None:
        """Have the sockets take little at a time, so that large payloads fill them."""
        for descriptor in connected_descriptors(self._ports()):
            with socket.socket(fileno=os.dup(descriptor)) as alias:
                alias.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    async def _cut(self) -> None:
        """Cut a connection, one way or both."""
        if found := list(connected_descriptors(self._ports())):
            with socket.socket(fileno=os.dup(self._rng.choice(found))) as alias, suppress(OSError):
                alias.shutdown(self._rng.choice((socket.SHUT_RDWR, socket.SHUT_WR, socket.SHUT_RD)))

    async def _move(self) -> None:
        """Stop serving an endpoint for a moment."""
        server, name = self._rng.choice(self._servers), self._rng.choice(tuple(SINGLE))
        await server.unregister(name, grace_s=self._rng.choice((0.0, 0.005)))
        with suppress(ValueError):
            server.register(name, SINGLE[name])

    async def _replace(self) -> None:
        """Drain a server while another takes its place."""
        number = self._rng.randrange(SERVERS)
        old, self._servers[number] = self._servers[number], await self._start(number)
        await old.drain(self._rng.choice((0.0, 0.01)))
        await old.aclose()

    async def _reopen(self) -> None:
        """Close a client with all that is under way on it."""
        number = self._rng.randrange(CLIENTS)
        old, self.clients[number] = self.clients[number], TcpClient(self.settings)
        await old.aclose()

    # ------------------------------------------------------------------- calm

    async def _calm(self) -> None:
        """Wait until nothing is under way, and check that nothing is left."""
        await asyncio.sleep(0)  # the event loop itself holds what woke this task, until here
        await settled(lambda: not any(server.in_flight_count for server in self._servers), self._state)
        await settled(lambda: not any(client.pending_count for client in self._all_clients()), self._state)
        me = asyncio.current_task()
        await settled(lambda: asyncio.all_tasks() <= {me, *runner_tasks()}, asyncio.all_tasks)
        await settled(lambda: not self._left_of_requests(), self._left_of_requests)
        await settled(lambda: not self._left_in_connections(), self._left_in_connections)

    async def _disconnect(self) -> None:
        """Close all connections, and wait until they are gone.

        How many of them stand is up to the weather of the last moments, and each has a dozen objects of its
        own: memory is compared where none does.
        """
        old = self._all_clients()
        self.clients = [TcpClient(self.settings) for _ in range(CLIENTS)]
        self._relay = TcpClient(self.settings)
        await asyncio.gather(*(client.aclose() for client in old))
        del old
        await settled(lambda: not self._connections(), self._connections)

    def _connections(self) -> list[Any]:
        return [found for found in self._new.living("planes") if type(found).__name__.endswith("Connection")]

    def _left_of_requests(self) -> dict[str, int]:
        found = self._new.census("planes")
        return (
            {name: found[name] for name in _PER_REQUEST & found.keys()}
            | {
                repr(endpoint.subject): endpoint.active_count
                for endpoint in self._new.living("planes.frames.server_request")
                if type(endpoint).__name__ == "RegisteredEndpoint"
                and (endpoint.active_count or endpoint.idle)
            }
            | {
                repr(budget): budget.held_bytes
                for budget in self._new.living("wire.budget")
                if budget.held_bytes
            }
        )

    def _left_in_connections(self) -> list[tuple[str, dict[str, int]]]:
        """The connections that hold something of a request."""
        return [(repr(found), full) for found in self._connections() if (full := contents(found))]

    def _all_clients(self) -> list[TcpClient]:
        return [*self.clients, self._relay]

    def _state(self) -> object:
        left = [found for found in self._new.living("planes") if type(found).__name__ in _PER_REQUEST]
        return self._servers, self._all_clients(), left

    async def _close(self) -> None:
        await asyncio.gather(*(client.aclose() for client in self._all_clients()))
        await asyncio.gather(*(server.aclose() for server in self._servers))
        self.clients, self._servers = [], []
        del self._relay


def connected_descriptors(ports: set[int]) -> Iterator[int]:
    """This process's sockets that are connected from or to one of the ports."""
    for entry in _DESCRIPTORS.iterdir() if _DESCRIPTORS.is_dir() else ():
        number = int(entry.name)
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as alias:
            ends = [alias.getsockname(), alias.getpeername()] if alias.family == socket.AF_INET else []
            if any(port in ports for _, port in ends):
                yield number


def runner_tasks() -> set[asyncio.Task[Any]]:
    """The tasks in which anyio's plugin runs a test."""
    return {task for task in asyncio.all_tasks() if "TestRunner." in str(task.get_coro())}
