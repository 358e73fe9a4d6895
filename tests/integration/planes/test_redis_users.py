"""The users of docs/security.md on the redis plane: callers and workers that Redis itself keeps apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import PlaneSettings, StoreSettings
from dynamo_redis.errors import CannotConnect, ConfigError, StoreRefused
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.select import make_client, make_server
from dynamo_redis.runtime import Client, DistributedRuntime, Settings
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer
from faults.servers import installed_servers
from tests.tcp_plane import INSTANCE, SECRET, echo, eventually

KINDS = {kind.name: kind for kind in installed_servers() if "6.2" not in kind.name}
"""Rules for reading and writing, and parts in parentheses, came with Redis 7."""
USERS = {"caller": "caller", "worker": "worker", "stranger": "caller"}
"""Each user, and the user of docs/security.md whose rules it has."""
PASSWORD = "pw-of-the-test"
LARGE_BYTES = 3 << 20
WAIT_S = 30.0


@pytest.fixture(params=sorted(KINDS))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    directory = tmp_path / "redis"
    directory.mkdir()
    async with EmbeddedServer(directory, port=0, binary=KINDS[request.param].binary) as running:
        yield running


@pytest.fixture
async def admin(server: EmbeddedServer, repository: Path) -> AsyncIterator[RedisClient]:
    """A client of the operator, which has made the users with the rules of the page."""
    client = RedisClient(server.url, timeout_s=10.0)
    lines = (repository / "docs" / "security.md").read_text().splitlines()
    for user, model in USERS.items():
        for name in ("dyn", model):
            (line,) = [line for line in lines if line.startswith(f"ACL SETUSER {name} ")]
            line = line.replace(f"SETUSER {name}", f"SETUSER {user}").replace("PASSWORD", PASSWORD)
            line = line.replace(f"/replies/{model}/", f"/replies/{user}/")
            await client.execute(*words(line))
    yield client
    await client.aclose()


def words(line: str) -> list[str]:
    """Return the words of a command, a part in parentheses as one word."""
    found: list[str] = []
    for word in line.split():
        if found and found[-1].startswith("(") and not found[-1].endswith(")"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def store_of(server: EmbeddedServer, user: str) -> dict[str, Any]:
    return {"redis_url": server.url.replace("//", f"//{user}:{PASSWORD}@"), "prefix": "dynamo"}


@asynccontextmanager
async def connected(server: EmbeddedServer, user: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(store_of(server, user)["redis_url"], timeout_s=10.0)
    yield client
    await client.aclose()


async def serve_numbers(request: int, context: Context) -> AsyncIterator[int]:
    for number in range(request):
        yield number
    await context.async_killed_or_stopped()


async def test_worker_and_caller_serve_under_their_own_users(
    admin: RedisClient, server: EmbeddedServer
) -> None:
    ended = asyncio.Event()

    async def numbers(request: int, context: Context) -> AsyncIterator[int]:
        async for number in serve_numbers(request, context):
            yield number
        ended.set()

    await admin.execute("ACL", "LOG", "RESET")
    async with AsyncExitStack() as stack:
        worker, caller = [
            await stack.enter_async_context(
                DistributedRuntime(
                    settings=Settings.load(
                        request_plane="redis",
                        connect_timeout_s=WAIT_S,
                        drain_s=2.0,
                        **store_of(server, user),
                    )
                )
            )
            for user in ("worker", "caller")
        ]
        await worker.endpoint("dynamo.backend.numbers").start_serving(numbers)
        await worker.endpoint("dynamo.backend.echo").start_serving(echo)
        answer = await (await open_client(caller, "numbers")).round_robin(3, annotated=False)
        assert [await anext(answer) for _ in range(3)] == [0, 1, 2]
        await answer.aclose()
        await asyncio.wait_for(ended.wait(), WAIT_S)
        content = bytes(range(256)) * (LARGE_BYTES // 256)
        answer = await (await open_client(caller, "echo")).round_robin(content, annotated=False)
        assert [item async for item in answer] == [content]
        keys = {key.decode() for key in await admin.execute("KEYS", "{dynamo/plane/*")}
        assert {key.partition("/plane/")[2].rpartition("/")[0] for key in keys} == {
            "requests/worker",
            "replies/caller",
        }
    assert not await admin.execute("KEYS", "{dynamo/plane/*")
    denied = [bytes(entry[entry.index(b"object") + 1]) for entry in await admin.execute("ACL", "LOG", 100)]
    assert [name for name in denied if not name.startswith(b"config")] == []


async def open_client(runtime: DistributedRuntime, endpoint: str) -> Client:
    client = await runtime.endpoint(f"dynamo.backend.{endpoint}").client()
    await client.wait_for_instances()
    return client


@pytest.mark.parametrize("kind", ["requests", "replies"])
async def test_users_are_refused_what_is_not_theirs(
    admin: RedisClient, server: EmbeddedServer, kind: str
) -> None:
    """A stranger has all rights of a caller, for replies of its own."""
    owner = "worker" if kind == "requests" else "caller"
    async with serving(server) as (_, client, to):
        assert await ask(client, to, "first") == ["first"]
        key = next(iter(await admin.execute("KEYS", f"{{dynamo/plane/{kind}/{owner}/*")))
        own = b"{dynamo/plane/replies/stranger/caller-1}:inbox"
        refused = [
            ("XREAD", "STREAMS", key, "0-0"),
            ("XRANGE", key, "-", "+"),
            ("XREADGROUP", "GROUP", "g", "c", "STREAMS", key, ">"),
            ("XGROUP", "CREATE", key, "g", "0"),
            ("XINFO", "STREAM", key),
            ("XLEN", key),
            ("XDEL", key, "1-1"),
            ("XTRIM", key, "MAXLEN", "0"),
            ("PEXPIRE", key, "1"),
            ("DEL", key),
            ("UNLINK", key),
            ("EVAL", "return redis.call('XLEN', KEYS[1])", "1", key),
        ]
        if kind == "replies":
            refused.append(("XADD", key, "NOMKSTREAM", "*", "f", "x"))
        async with connected(server, "stranger") as stranger:
            for command in refused:
                with pytest.raises(StoreRefused, match=r"NOPERM|ACL"):
                    await stranger.execute(*command)
            if kind == "requests":
                assert await stranger.execute("XADD", key, "NOMKSTREAM", "*", "f", "x") is not None
            assert await stranger.execute("XADD", own, "*", "f", "x") is not None
            assert await stranger.execute("UNLINK", own) == 1
        assert await ask(client, to, "last") == ["last"]


@pytest.mark.parametrize("command", ["xadd", "xread", "xtrim", "pexpire", "unlink"])
async def test_missing_right_to_receive_is_named(
    admin: RedisClient, server: EmbeddedServer, command: str
) -> None:
    """Also one that is needed only later shows at the start."""
    for user, own, others in (("caller", "replies", "requests"), ("worker", "requests", "replies")):
        granted = {"xadd", "xread", "xtrim", "pexpire", "unlink"} - {command}
        await admin.execute(
            "ACL", "SETUSER", user, "clearselectors", f"(+xadd %W~{{dynamo/plane/{others}/*)",
            f"({' '.join(f'+{name}' for name in granted)} ~{{dynamo/plane/{own}/{user}/*)",
        )  # fmt: skip
    plane = PlaneSettings.load(request_plane="redis")
    client = make_client(plane, store=settings_of(server, "caller"))
    worker = make_server(plane, secret=SECRET, instance_id=INSTANCE, store=settings_of(server, "worker"))
    needed = "(+xadd +xread +xtrim +pexpire +unlink ~{{dynamo/plane/{}/{}/*)"
    try:
        with pytest.raises(CannotConnect, match="NOPERM") as refused:
            await ask(client, Target(INSTANCE, "worker.1", "echo", SECRET), 1)
        assert needed.format("replies", "caller") in str(refused.value)
        assert PASSWORD not in str(refused.value)
        with pytest.raises(ConfigError, match=r"DYN_REQUEST_PLANE=redis: .*NOPERM") as not_started:
            await worker.start()
        assert needed.format("requests", "worker") in str(not_started.value)
    finally:
        await client.aclose()
        await worker.aclose()


async def test_missing_right_to_send_fails_those_requests_only(
    admin: RedisClient, server: EmbeddedServer
) -> None:
    """The other worker's requests go through the same link, in the same round trips."""
    await admin.execute(
        "ACL", "SETUSER", "caller", "clearselectors", "(+xadd %W~{dynamo/plane/requests/worker/*)",
        "(+xadd +xread +xtrim +pexpire +unlink ~{dynamo/plane/replies/caller/*)",
    )  # fmt: skip
    async with serving(server) as (worker, client, to):
        stream = client.open(Target(INSTANCE, to.address, "numbers", SECRET), 2, Context())
        assert [await anext(stream), await anext(stream)] == [0, 1]
        for _ in range(3):
            answer = asyncio.create_task(ask(client, to, 1))
            with pytest.raises(CannotConnect) as refused:
                await ask(client, Target(INSTANCE, "another.1", "echo", SECRET), 1)
            assert "user caller needs (+xadd %W~{dynamo/plane/requests/*)" in str(refused.value)
            assert await answer == [1]
        assert worker.in_flight_count == 1
        await stream.aclose()


async def test_worker_that_may_not_answer_says_so(
    admin: RedisClient, server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    await admin.execute(
        "ACL", "SETUSER", "worker", "clearselectors",
        "(+xadd +xread +xtrim +pexpire +unlink ~{dynamo/plane/requests/worker/*)",
    )  # fmt: skip
    async with serving(server, connect_timeout_s=1.0) as (_, client, to):
        with pytest.raises(CannotConnect, match="no answer from"):
            await ask(client, to, 1)
        await eventually(
            lambda: "user worker needs (+xadd %W~{dynamo/plane/replies/*)" in caplog.text, WAIT_S
        )


async def test_rights_taken_away_and_given_back(admin: RedisClient, server: EmbeddedServer) -> None:
    """A link under way ends its requests with the missing rule, and goes on when it is there again."""
    rules = "(+xadd %W~{dynamo/plane/requests/*)", "(+xadd +xread +xtrim +pexpire +unlink ~{dynamo/plane/replies/caller/*)"  # fmt: skip # noqa: E501
    async with serving(server) as (_, client, to):

        async def outcome() -> object:
            try:
                return await ask(client, to, 1)
            except CannotConnect as exc:
                return str(exc)
            except Exception as exc:  # noqa: BLE001 - a connection under way was lost
                return exc

        assert await outcome() == [1]
        await admin.execute("ACL", "SETUSER", "caller", "clearselectors")
        await until(outcome, lambda found: isinstance(found, str) and "user caller needs" in found)
        await admin.execute("ACL", "SETUSER", "caller", *rules)
        await until(outcome, lambda found: found == [1])


async def until(outcome: Callable[[], Awaitable[object]], is_wanted: Callable[[object], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_wanted(await outcome()):
            await asyncio.sleep(0.05)


def settings_of(server: EmbeddedServer, user: str) -> StoreSettings:
    return StoreSettings.load(**store_of(server, user))


@asynccontextmanager
async def serving(
    server: EmbeddedServer, **settings: Any
) -> AsyncIterator[tuple[RequestPlaneServer, RequestPlaneClient, Target]]:
    """A worker's and a caller's end of the plane, each under its user."""
    chosen = PlaneSettings.load(**{"request_plane": "redis", "connect_timeout_s": WAIT_S, **settings})
    worker = make_server(chosen, secret=SECRET, instance_id=INSTANCE, store=settings_of(server, "worker"))
    worker.register("echo", echo)
    worker.register("numbers", serve_numbers)
    client = make_client(chosen, store=settings_of(server, "caller"))
    try:
        await worker.start()
        yield worker, client, Target(INSTANCE, worker.address, "echo", SECRET)
    finally:
        await client.aclose()
        await worker.aclose()


async def ask(client: RequestPlaneClient, to: Target, request: Any) -> list[Any]:
    return [item async for item in client.open(to, request, Context())]
