"""The nats and redis planes while their broker is killed and restarted, and their peers die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from dynamo_redis.config import PlaneSettings, StoreSettings
from dynamo_redis.errors import CannotConnect, ConfigError, ConnectionLost, PlaneError
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.frames.client import FrameClient
from dynamo_redis.planes.nats.link import NatsLink
from dynamo_redis.planes.redis import link as redis_link
from dynamo_redis.planes.redis.link import RedisLink
from dynamo_redis.planes.select import make_server
from dynamo_redis.planes.tunnel.server import TunnelServer
from dynamo_redis.store.keys import inbox_key
from dynamo_redis.wire import tunnel
from tests.broker_plane import Broker, RedisBroker, ask, serving, target
from tests.tcp_plane import INSTANCE, SECRET, eventually

RECOVERY_S = 30.0


async def test_a_broker_killed_under_load_costs_retryable_errors(broker: Broker) -> None:
    async with serving(broker.plane) as (server, client):
        to, errors, answered, stop = target(server), [], [], asyncio.Event()

        async def call_on() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    assert await ask(client, to, number) == [number]
                    answered.append(time.monotonic())
                except PlaneError as exc:
                    errors.append(exc)
                    await asyncio.sleep(0.02)

        callers = [asyncio.create_task(call_on()) for _ in range(8)]
        await eventually(lambda: len(answered) > 100)
        await broker.kill()
        await eventually(lambda: len(errors) > 8)
        await asyncio.sleep(1.0)
        restarted_at = time.monotonic()
        await broker.start()
        await eventually(lambda: answered[-1] > restarted_at, RECOVERY_S)
        stop.set()
        await asyncio.gather(*callers)
        assert all(error.retryable for error in errors)
        assert {type(error) for error in errors} <= {CannotConnect, ConnectionLost}


async def test_a_request_under_way_ends_when_the_broker_is_lost(broker: Broker) -> None:
    async with serving(broker.plane) as (server, client):

        async def wait(_: Any, context: Context) -> AsyncIterator[int]:
            yield 1
            await context.async_killed_or_stopped()

        server.register("wait", wait)
        stream = client.open(target(server, "wait"), None, Context())
        assert await anext(stream) == 1
        await broker.kill()
        began_at = time.monotonic()
        with pytest.raises(ConnectionLost):
            await anext(stream)
        assert time.monotonic() - began_at < RECOVERY_S
        await eventually(lambda: not server.in_flight_count)


async def test_a_server_without_its_broker_says_so_at_once(broker: Broker) -> None:
    await broker.kill()
    settings = PlaneSettings.load(request_plane=broker.plane, connect_timeout_s=1.0)
    server = make_server(settings, secret=SECRET, instance_id=INSTANCE)
    with pytest.raises(ConfigError, match=f"DYN_REQUEST_PLANE={broker.plane}"):
        await server.start()
    await server.aclose()


async def test_a_worker_that_has_ended_is_refused_at_once(broker: Broker) -> None:
    async with serving(broker.plane) as (server, client):
        to = target(server)
        await server.aclose()
        with pytest.raises(CannotConnect, match="no process listens there"):
            await ask(client, to, 1)


async def test_a_caller_that_vanishes_leaves_nothing_at_the_server(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server notices it by a message that reaches no process."""
    monkeypatch.setattr("dynamo_redis.planes.tunnel.tunnels.CHECK_S", 0.2)
    monkeypatch.setattr(redis_link, "EXPIRY_S", 1.0)
    async with serving(broker.plane) as (server, client):
        assert isinstance(server, TunnelServer)
        assert await ask(client, target(server), 1) == [1]
        assert server.connection_count == 1
        assert isinstance(client, FrameClient)
        link = client._carrier._tunnels._link  # type: ignore[attr-defined]
        await vanish(link)
        await eventually(lambda: not server.connection_count, RECOVERY_S)


async def vanish(link: Any) -> None:
    """End a link as the death of its process does: without a word to its peers."""
    if isinstance(link, NatsLink):
        link._is_up, link._is_closing = False, True  # else the link connects anew
        link._owner = _Nobody()
        assert link._client is not None
        await link._client.close()
    else:
        link._is_up = False
        for task in link._tasks:
            task.cancel()
        link._tasks = []


class _Nobody:
    def on_message(self, message: bytes, sender: str) -> None: ...

    def on_unreachable(self, connection_id: bytes, reason: str = "") -> None: ...

    def on_lost(self, reason: str) -> None: ...


async def test_requests_to_a_dead_worker_on_redis_fail_and_never_run(
    redis_broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "EXPIRY_S", 2.0)
    async with serving("redis") as (server, client):
        assert isinstance(server, TunnelServer)
        ran: list[Any] = []

        async def note(request: Any, _: Context) -> Any:
            ran.append(request)
            return request

        server.register("note", note)
        to = target(server, "note")
        await vanish(server._link)
        with pytest.raises(CannotConnect):
            await ask(client, to, "too late")
        store = StoreSettings.load()
        redis = Redis.from_url(store.require_url())
        key = inbox_key(store.prefix, "requests", server.address)
        deadline = time.monotonic() + RECOVERY_S
        while await redis.exists(key):
            assert time.monotonic() < deadline, "the dead worker's stream stays"
            await asyncio.sleep(0.1)
        await redis.aclose()
        assert not ran


@pytest.mark.parametrize("dead", ["caller", "worker"])
async def test_stream_of_a_dead_process_is_bounded_and_goes(
    dead: str, redis_broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side goes on sending to it until the stream is removed, and does not make it anew."""
    monkeypatch.setattr(redis_link, "EXPIRY_S", 6.0)
    async with serving("redis", connect_timeout_s=RECOVERY_S) as (server, client):
        assert isinstance(server, TunnelServer)
        assert isinstance(client, FrameClient)

        async def send_on(_: Any, __: Context) -> AsyncIterator[bytes]:
            while True:
                yield bytes(50_000)

        async def read_on(messages: AsyncIterator[bytes], _: Context) -> AsyncIterator[int]:
            async for message in messages:
                yield len(message)

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield bytes(50_000)

        server.register("send", send_on)
        server.register("read", read_on, request_stream=True)
        if dead == "caller":
            stream = client.open(target(server, "send"), None, Context())
        else:
            stream = client.open(target(server, "read"), bytes(1), Context(), messages=endless())
        await anext(stream)
        caller_link = client._carrier._tunnels._link  # type: ignore[attr-defined]
        link = caller_link if dead == "caller" else server._link
        assert isinstance(link, RedisLink)
        await vanish(link)
        async with reading() as redis:
            largest_bytes, deadline = 0, time.monotonic() + RECOVERY_S
            while await redis.exists(link._key):
                assert time.monotonic() < deadline, "the stream stays"
                largest_bytes = max(largest_bytes, await redis.memory_usage(link._key, samples=0) or 0)
                await asyncio.sleep(0.02)
            assert largest_bytes < 2 * tunnel.WINDOW_BYTES
            if dead == "worker":
                with pytest.raises((CannotConnect, ConnectionLost)):
                    await ask(client, target(server), 1)
            else:
                server._tunnels._check()  # as every 30 s
                await eventually(lambda: not server.connection_count, RECOVERY_S)
            assert not await redis.exists(link._key)
        await stream.aclose()


@asynccontextmanager
async def reading() -> AsyncIterator[Redis]:
    redis = Redis.from_url(StoreSettings.load().require_url())
    yield redis
    await redis.aclose()


async def test_redis_holds_nothing_that_was_read(redis_broker: RedisBroker) -> None:
    async with serving("redis") as (server, client):
        for size_bytes in (10, 100_000, 3 << 20):
            assert await ask(client, target(server), bytes(size_bytes)) == [bytes(size_bytes)]
        store = StoreSettings.load()
        redis = Redis.from_url(store.require_url())
        key = inbox_key(store.prefix, "requests", server.address)
        deadline = time.monotonic() + RECOVERY_S
        while await redis.xlen(key):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert 0 < await redis.pttl(key) <= redis_link.EXPIRY_S * 1000
        await redis.aclose()


@pytest.mark.parametrize("address", ["\ud800", "a b", "", "a.*", "x\r\ny"])
async def test_an_unusable_address_fails_its_own_requests_only(broker: Broker, address: str) -> None:
    async with serving(broker.plane) as (server, client):

        async def count(_: Any, __: Context) -> AsyncIterator[int]:
            yield 1
            await asyncio.sleep(0)
            yield 2

        server.register("count", count)
        stream = client.open(target(server, "count"), None, Context())
        assert await anext(stream) == 1
        with pytest.raises(CannotConnect, match="no address"):
            await ask(client, Target(INSTANCE, address, "echo", SECRET), 1)
        assert await anext(stream) == 2
        assert await ask(client, target(server), 1) == [1]
