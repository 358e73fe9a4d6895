"""Meanings of server errors that arrive over a socket: from servers of every kind, and from a scripted
one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable, StreamLost
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.server import EmbeddedServer
from faults.servers import ServerKind, installed_servers

SCRIPT = Script.of("one", "return 1")
KINDS = {kind.name: kind for kind in installed_servers()}


class Answering:
    """A server that answers OK until `error` is set, and then with that error."""

    def __init__(self) -> None:
        self.error = b""
        self.connections_count = 0
        self.url = ""
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def aclose(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait(list(self._open))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        self.connections_count += 1
        try:
            while line := await reader.readline():
                words = []
                for _ in range(int(line[1:])):
                    size = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(size + 2))[:-2].upper())
                is_greeting = words[0] in (b"CLIENT", b"PSUBSCRIBE")
                writer.write(b"-" + self.error + b"\r\n" if self.error and not is_greeting else b"+OK\r\n")
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            del self._open[task]
            writer.close()


@pytest.fixture
async def answering() -> AsyncIterator[Answering]:
    server = Answering()
    await server.start()
    yield server
    await server.aclose()


async def in_pool(client: RedisClient) -> None:
    await client.execute("GET", "k")


async def in_pipeline(client: RedisClient) -> None:
    await client.pipeline([("GET", "k"), ("GET", "l")])


async def in_script(client: RedisClient) -> None:
    await client.script(SCRIPT, ["k"])


async def in_blocking_read(client: RedisClient) -> None:
    connection = client.blocking()
    try:
        await connection.execute(pack("XREAD", "STREAMS", "k", "0"), block_s=0.0)
    finally:
        await connection.aclose()


async def in_thread(client: RedisClient) -> None:
    connection = client.sync(1.0)
    try:
        await asyncio.to_thread(connection.script, SCRIPT, ["k"])
    finally:
        connection.close()


async def in_subscription(client: RedisClient) -> None:
    subscription = await client.subscribe("c*")
    try:
        await subscription.next_message(0.05)
    finally:
        await subscription.aclose()


WAYS = [in_pool, in_pipeline, in_script, in_blocking_read, in_thread, in_subscription]

ERRORS: list[tuple[str, type[StoreError], bool]] = [
    # (text from the server, resulting error, whether all connections are replaced)
    ("READONLY You can't write against a read only replica.", StoreUnavailable, True),
    ("UNBLOCKED force unblock from blocking operation, instance state changed", StoreUnavailable, True),
    ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is 'no'.", StoreUnavailable, True),
    ("LOADING Redis is loading the dataset in memory", StoreUnavailable, True),
    ("CLUSTERDOWN The cluster is down", StoreUnavailable, True),
    ("CLUSTERDOWN Hash slot not served", StoreUnavailable, True),
    ("MOVED 7087 127.0.0.1:7000", StoreUnavailable, True),
    ("MOVED 7087", StoreUnavailable, True),
    ("NOAUTH Authentication required.", StoreRefused, True),
    ("upstream failure", StoreUnavailable, True),
    ("ASK 7087 127.0.0.1:7000", StoreUnavailable, False),
    ("TRYAGAIN Multiple keys request during rehashing of slot", StoreUnavailable, False),
    ("BUSY Redis is busy running a script.", StoreUnavailable, False),
    ("NOREPLICAS Not enough good replicas to write.", StoreUnavailable, False),
    ("ERR max number of clients reached", StoreUnavailable, False),
    ("OOM command not allowed when used memory > 'maxmemory'.", StoreRefused, False),
    ("MISCONF Redis is configured to save RDB snapshots", StoreRefused, False),
    ("WRONGPASS invalid username-password pair or user is disabled.", StoreRefused, False),
    ("NOPERM this user has no permissions to run the 'get' command", StoreRefused, False),
    ("DENIED Redis is running in protected mode", StoreRefused, False),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", StoreRefused, False),
    ("CROSSSLOT Keys in request don't hash to the same slot", StoreRefused, False),
    ("NOGROUP No such key 'k' or consumer group 'g'", StreamLost, False),
    ("UNBLOCKED the stream key no longer exists", StreamLost, False),
    ("UNKILLABLE Sorry the script already executed write commands", StoreRefused, False),
    ("ERR syntax error", StoreRefused, False),
    ("NEWCODE of a server that is yet to come", StoreRefused, False),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("sent", "kind", "leaves"), ERRORS)
async def test_error_of_a_server_is_shown_complete(
    answering: Answering,
    way: Callable[[RedisClient], Awaitable[None]],
    sent: str,
    kind: type[StoreError],
    leaves: bool,
) -> None:
    client = RedisClient(answering.url, timeout_s=5.0)
    await client.execute("PING")
    answering.error = sent.encode()
    if sent.startswith("MISCONF") and way is in_subscription:
        await way(client)  # it was asked whether it is there, and answered
        await client.aclose()
        return
    with pytest.raises(StoreError) as error:
        await way(client)
    assert type(error.value) is kind
    assert sent in str(error.value)
    assert f"Redis at {client.address} " in str(error.value)
    await client.aclose()


@pytest.mark.parametrize(("sent", "leaves"), [(sent, leaves) for sent, _, leaves in ERRORS])
async def test_all_connections_are_made_anew_where_needed(
    answering: Answering, sent: str, leaves: bool
) -> None:
    client = RedisClient(answering.url, timeout_s=5.0)
    reader, thread = client.blocking(), client.sync(5.0)
    subscription = await client.subscribe("c*")

    async def use_all() -> None:
        await asyncio.gather(*(client.execute("PING") for _ in range(3)))
        await reader.execute(pack("PING"), block_s=0.0)
        await asyncio.to_thread(thread.script, SCRIPT, ["k"])

    await use_all()
    made_count = answering.connections_count
    answering.error = sent.encode()
    with pytest.raises(StoreError):
        await client.script(SCRIPT, ["k"])
    answering.error = b""
    await use_all()
    again_count = answering.connections_count - made_count
    if leaves:
        assert again_count >= 3, "a pooled connection, the reader's and the thread's at least"
        with pytest.raises(StoreUnavailable, match="subscribe again"):
            await subscription.next_message(0.05)
    else:
        assert again_count <= 1, "only the one that redis-py drops after such an error"
    await subscription.aclose()
    await reader.aclose()
    thread.close()
    await client.aclose()


async def test_a_password_in_an_unknown_command_is_not_repeated(answering: Answering) -> None:
    client = RedisClient(answering.url, timeout_s=5.0)
    answering.error = b"ERR unknown command 'AUTH', with args beginning with: 'us3r' 's3cret' "
    with pytest.raises(StoreRefused, match="unknown command 'AUTH'") as error:
        await client.execute("AUTH", "us3r", "s3cret")
    assert "s3cret" not in str(error.value)
    await client.aclose()


# --------------------------------------------------------------------------- servers of every kind


@pytest.fixture(params=sorted(KINDS))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A server of each kind on this machine."""
    kind: ServerKind = KINDS[request.param]
    async with EmbeddedServer(tmp_path, port=0, binary=kind.binary) as running:
        yield running


async def test_errors_inside_scripts_are_read_as_outside(server: EmbeddedServer) -> None:
    admin, client = RedisClient(server.url, timeout_s=5.0), RedisClient(server.url, timeout_s=5.0)
    write = Script.of("test", "return redis.call('SET', KEYS[1], 'v')")
    read = Script.of("test", "return redis.call('GET', KEYS[1])")

    async def says(script: Script, kind: type[StoreError], code: str, meaning: str) -> None:
        with pytest.raises(StoreError) as error:
            await client.script(script, ["k"])
        assert type(error.value) is kind
        assert meaning in str(error.value)
        assert f"({code}" in str(error.value), "nothing before the code that the command answered"
        assert "user_script" not in str(error.value)

    await admin.execute("SADD", "k", "member")
    await says(read, StoreRefused, "WRONGTYPE", "choose another DYN_REDIS_PREFIX")
    await admin.execute("CONFIG", "SET", "maxmemory", "1")
    await says(write, StoreRefused, "OOM", "raise its maxmemory")
    await admin.execute("CONFIG", "SET", "maxmemory", "0")
    await admin.execute("CONFIG", "SET", "min-replicas-to-write", "1")
    await says(write, StoreUnavailable, "NOREPLICAS", "too few replicas")
    await admin.execute("CONFIG", "SET", "min-replicas-to-write", "0")
    await admin.execute("REPLICAOF", "127.0.0.1", "1")
    await says(write, StoreUnavailable, "READONLY", "read-only replica")
    await admin.execute("CONFIG", "SET", "replica-serve-stale-data", "no")
    await says(read, StoreUnavailable, "MASTERDOWN", "has lost its primary")
    await admin.execute("REPLICAOF", "NO", "ONE")
    await admin.execute("ACL", "SETUSER", "default", "-get")
    await says(read, StoreRefused, "", "docs/security.md")
    await admin.execute("ACL", "SETUSER", "default", "+get", "resetkeys", "~other")
    with pytest.raises(StoreRefused, match=r"docs/security\.md"):
        await client.script(Script.of("test", "return redis.call('GET', 'k')"), ["other"])
    await client.aclose()
    await admin.aclose()


async def test_a_waiting_read_ends_when_its_server_is_demoted(server: EmbeddedServer) -> None:
    admin, client = RedisClient(server.url, timeout_s=5.0), RedisClient(server.url, timeout_s=5.0)
    reader = client.blocking()
    waiting = asyncio.create_task(
        reader.execute(pack("XREAD", "BLOCK", 60_000, "STREAMS", "s", "$"), block_s=60.0)
    )
    async with asyncio.timeout(30):
        while b"cmd=xread" not in await admin.execute("CLIENT", "LIST"):
            await asyncio.sleep(0.01)
        await admin.execute("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailable, match="UNBLOCKED"):
            await waiting
    await reader.aclose()
    await client.aclose()
    await admin.aclose()
