"""Servers, and proxies before them, that refuse a connection or a command: either the client works without
it, or the error names it."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.server import EmbeddedServer

WAIT_S = 20.0
ECHO = Script.of("echo", "return ARGV[1]")

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    """Yield the URL of a server that handles each connection by this function; all are closed at the end."""
    tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def treat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks[task] = writer
        try:
            await serve(reader, writer)
        except OSError:
            pass
        finally:
            del tasks[task]
            writer.close()

    server = await asyncio.start_server(treat, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in tasks.values():
            writer.transport.abort()
        if tasks:
            await asyncio.wait(list(tasks))


def hanging_up_at(command: bytes, target: str) -> Serve:
    """A proxy that closes a connection upon a command that it does not know."""
    port = int(target.rpartition(":")[2])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)

        async def answer() -> None:
            while content := await from_server.read(1 << 16):
                writer.write(content)

        answering = asyncio.create_task(answer())
        try:
            while content := await reader.read(1 << 16):
                if b"\r\n%b\r\n" % command in content:
                    return
                to_server.write(content)
        finally:
            to_server.transport.abort()
            await asyncio.wait([answering])

    return serve


def saying(words: bytes, *, reset: bool) -> Serve:
    """A server that sends a message to each new connection and closes it."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-" + words + b"\r\n")
        if reset:
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return serve


async def in_thread(client: RedisClient) -> Any:
    connection = client.sync(5.0)
    try:
        return await asyncio.to_thread(connection.script, ECHO, ["k"], ["v"])
    finally:
        connection.close()


# --------------------------------------------------------------------------- commands


async def test_scripts_are_sent_whole_where_evalsha_is_refused(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, port=0) as server:
        client = RedisClient(server.url, timeout_s=5.0)
        await client.execute("ACL", "SETUSER", "default", "-evalsha")
        for _ in range(2):
            assert await client.script(ECHO, ["k"], ["v"]) == b"v"
            assert await in_thread(client) == b"v"
        stats = await client.execute("INFO", "commandstats")
        assert b"rejected_calls=1," in next(
            line for line in stats.splitlines() if b"cmdstat_evalsha:" in line
        )
        await client.aclose()


async def test_scripts_are_sent_whole_where_evalsha_is_unknown() -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            asked.append(words[0])
            known = words[0] in (b"EVAL", b"CLIENT")
            writer.write(b"$1\r\nv\r\n" if known else b"-ERR unknown command '%b'\r\n" % words[0])

    async with listening(serve) as url:
        client = RedisClient(url, timeout_s=5.0)
        for _ in range(2):
            assert await client.script(ECHO, ["k"], ["v"]) == b"v"
            assert await in_thread(client) == b"v"
        assert asked.count(b"EVALSHA") == 1
        await client.aclose()


async def test_a_connection_needs_no_name(own_redis_server: EmbeddedServer) -> None:
    async with listening(hanging_up_at(b"CLIENT", own_redis_server.url)) as url:
        client = RedisClient(url, timeout_s=5.0)
        await client.connect()
        assert await in_thread(client) == b"v"
        subscription = await client.subscribe("c")
        await subscription.aclose()
        await client.aclose()


async def test_a_command_that_ends_the_connection_is_named(own_redis_server: EmbeddedServer) -> None:
    async with listening(hanging_up_at(b"EVALSHA", own_redis_server.url)) as url:
        client = RedisClient(url, timeout_s=5.0)
        await client.connect()
        with pytest.raises(StoreUnavailable, match="in answer to EVALSHA or EVAL"):
            await client.script(ECHO, ["k"], ["v"])
        with pytest.raises(StoreUnavailable, match="in answer to EVALSHA or EVAL"):
            await in_thread(client)
        await client.aclose()


# --------------------------------------------------------------------------- connections


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("password", ["", ":secret@"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (b"ERR max number of clients reached", "raise its maxclients"),
        (b"DENIED Redis is running in protected mode because " + b"x" * 900, "in protected mode"),
    ],
)
async def test_last_words_of_a_server_are_told(words: bytes, says: str, password: str, reset: bool) -> None:
    async with listening(saying(words, reset=reset)) as url:
        client = RedisClient(url.replace("//", f"//{password}"), timeout_s=5.0)
        for _ in range(5):
            with pytest.raises(StoreError, match=says) as error:
                await client.execute("PING")
            assert words[:40].decode() in str(error.value)
            assert len(str(error.value)) < 700
        await client.aclose()


async def test_error_names_a_server_at_its_limit_of_connections(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, port=0, settings={"maxclients": "2"}) as server:
        port = int(server.url.rpartition(":")[2])
        others = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        client = RedisClient(server.url, timeout_s=5.0)
        async with asyncio.timeout(WAIT_S):
            while True:  # the last of the others may have no place yet
                try:
                    await client.execute("PING")
                except StoreUnavailable as exc:
                    if "raise its maxclients" in str(exc):
                        break
                await asyncio.sleep(0.02)
        for other in others:
            other.close()
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await client.connect()
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.02)
        await client.aclose()


async def test_a_changed_password_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, open_registry: Any
) -> None:
    async with EmbeddedServer(tmp_path, port=0, settings={"requirepass": "old"}) as server:
        url = server.url.replace("//", "//:old@")
        admin = RedisClient(url, timeout_s=5.0)
        registry = await open_registry(url, ttl_s=2.0)
        await registry.register("i/1", b"v")
        await admin.execute("CONFIG", "SET", "requirepass", "new")
        with pytest.raises(StoreRefused, match="user name or password"):
            await in_thread(registry._client)
        (warning,) = [record for record in caplog.records if record.name.endswith("redis.login")]
        assert warning.levelno == logging.WARNING
        assert "a new connection is refused" in warning.getMessage()
        assert "user name or password of DYN_REDIS_URL" in warning.getMessage()
        assert "change DYN_REDIS_URL and restart this process" in warning.getMessage()
        with pytest.raises(StoreRefused):
            await in_thread(registry._client)
        other = RedisClient(url, timeout_s=5.0)
        other._server.has_logged_in = True  # as after an earlier connection
        with pytest.raises(StoreRefused):
            await other.execute("PING")
        await other.aclose()
        assert len([record for record in caplog.records if record.name.endswith("redis.login")]) == 1
        await registry.put("k", b"v")  # by a connection that was made before
        await admin.execute("CONFIG", "SET", "requirepass", "old")
        await admin.aclose()


async def test_the_keepalive_connects_before_it_is_needed(
    own_redis_server: EmbeddedServer, open_registry: Any
) -> None:
    admin = RedisClient(own_redis_server.url, timeout_s=5.0)
    registry = await open_registry(own_redis_server.url, ttl_s=120.0)
    await registry.register("i/1", b"v")
    name = f"name=dynamo-redis:{registry.lease_id:x} ".encode()

    async def is_connected() -> bool:
        lines = (await admin.execute("CLIENT", "LIST")).splitlines()
        return any(name in line and b" psub=0 " in line and b" cmd=ping " in line for line in lines)

    async with asyncio.timeout(WAIT_S):
        while not await is_connected():  # the first renewal is due after 72 s
            await asyncio.sleep(0.02)
    await admin.aclose()


async def test_a_full_server_costs_no_lease(tmp_path: Path, open_registry: Any) -> None:
    async with EmbeddedServer(tmp_path, port=0, settings={"maxclients": "12"}) as server:
        registry = await open_registry(server.url, ttl_s=10.0)
        await registry.get("i/1")
        async with crowd(server.url):
            await registry.register("i/1", b"v")  # only now the keepalive wants a connection of its own
            first = await deadline_of_lease(registry)
            async with asyncio.timeout(3 * WAIT_S):
                while await deadline_of_lease(registry) < first + 11_000:  # two renewals
                    assert registry.lease_losses == 0
                    await asyncio.sleep(0.05)
            assert registry.lease_losses == 0
            record = await registry.get("i/1")
            assert record is not None
            assert record.version == 1


async def test_renewal_over_a_cut_link_is_tried_once(
    tmp_path: Path, open_registry: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A further attempt, over the event loop's connections, would take the time of the next."""
    caplog.set_level(logging.DEBUG, "dynamo_redis.store.registry.lease")
    async with EmbeddedServer(tmp_path, port=0) as server:
        registry = await open_registry(server.url, ttl_s=2.0)
        await registry.register("i/1", b"v")
        further: list[float] = []
        monkeypatch.setattr(registry._client, "from_thread", lambda _, timeout_s: further.append(timeout_s))
        await server.kill()
        async with asyncio.timeout(3 * WAIT_S):
            while sum(record.message.startswith("keepalive: ") for record in caplog.records) < 2:
                await asyncio.sleep(0.05)
        assert further == []


@asynccontextmanager
async def crowd(url: str) -> AsyncIterator[None]:
    """Open every connection that the server still allows."""
    port = int(url.rpartition(":")[2])
    others = []
    try:
        while True:
            other = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
            others.append(other)
            other.sendall(b"PING\r\n")
            if not other.recv(64).startswith(b"+PONG"):
                break
        yield
    finally:
        for other in others:
            other.close()


async def deadline_of_lease(registry: Any) -> float:
    """Return a lease's deadline on the registry's service clock, in ms."""
    keys = registry._kv.keys
    return float(await registry._client.execute("ZSCORE", keys.structure("leases"), f"{registry.lease_id:x}"))
