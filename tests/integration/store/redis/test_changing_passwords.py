"""Users and passwords that change under open connections: from files, and from providers of tokens."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.auth.token import SimpleToken
from redis.credentials import CredentialProvider, StreamingCredentialProvider

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import ConfigError, StoreUnavailable
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.store.redis import credential_origins, credentials
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.server import EmbeddedServer

WAIT_S = 30.0
USER = "app"
FIRST, SECOND = "first-Hunter2pass", "second-Hunter2pass"
WHO = Script.of("who", "return KEYS[1]")

Open = Callable[..., StoreClient]


class Tokens:
    """Answers of the providers of these tests, and how often they were asked."""

    answers: Callable[[], Any]
    count = 0
    entra: Any = None

    @classmethod
    def give(cls, answers: Callable[[], Any]) -> None:
        cls.answers, cls.count = staticmethod(answers), 0


def provider() -> Any:
    Tokens.count += 1
    return Tokens.answers()


async def async_provider() -> Any:
    await asyncio.sleep(0)
    return provider()


class RedisPyProvider(CredentialProvider):
    def get_credentials(self) -> Any:
        return provider()


class AsyncRedisPyProvider(CredentialProvider):
    async def get_credentials_async(self) -> Any:
        return provider()


class StreamingProvider(StreamingCredentialProvider):
    """Brings tokens by itself, as `redis-entraid` does."""

    made: StreamingProvider

    def __init__(self) -> None:
        StreamingProvider.made = self

    def get_credentials(self) -> Any:
        return provider()

    def on_next(self, callback: Callable[[Any], None]) -> None:
        self.bring = callback

    def on_error(self, callback: Callable[[Exception], None]) -> None:
        self.fail = callback

    def is_streaming(self) -> bool:
        return True


@pytest.fixture
async def admin(own_redis_server: EmbeddedServer) -> AsyncIterator[RedisClient]:
    """A client of the operator, which has made the user."""
    client = RedisClient(own_redis_server.url, timeout_s=5.0)
    await client.execute("ACL", "SETUSER", USER, "on", f">{FIRST}", "~*", "&*", "+@all")
    yield client
    await client.aclose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(FIRST + "\n")
    return path


@pytest.fixture
async def opened(own_redis_server: EmbeddedServer) -> AsyncIterator[Open]:
    """Opens clients with settings."""
    clients: list[StoreClient] = []

    def open_one(**given: Any) -> StoreClient:
        settings = StoreSettings.load(**({"redis_url": own_redis_server.url} | given))
        clients.append(open_client(settings.require_url(), timeout_s=5.0, login=settings.login()))
        return clients[-1]

    yield open_one
    for client in clients:
        await client.aclose()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.02)


async def change(admin: RedisClient, file: Path) -> None:
    """Change the password, in the server and in the file."""
    await admin.execute("ACL", "SETUSER", USER, f">{SECOND}")
    replacement = file.with_suffix(".new")
    replacement.write_text(SECOND + "\n")
    replacement.rename(file)
    await admin.execute("ACL", "SETUSER", USER, f"<{FIRST}")


def version_of(client: Any) -> int:
    version: int = client._server.login_version
    return version


class EachKind:
    """A connection of each kind of one client."""

    def __init__(self, client: StoreClient) -> None:
        self.client = client
        self.blocking = client.blocking("k")
        self.thread = client.sync(5.0, key="k")

    async def start(self) -> None:
        self.subscription = await self.client.subscribe_channel("channel")
        await self.use()

    async def use(self) -> None:
        """Use each connection; raises StoreError if one cannot be used."""
        await self.client.execute("SET", "k", "v")
        assert await self.blocking.execute(pack("GET", "k"), block_s=1.0) == b"v"
        assert await asyncio.to_thread(self.thread.script, WHO, ["k"]) == b"k"
        await self.subscription.next_message(0.01)

    async def aclose(self) -> None:
        await self.blocking.aclose()
        await self.subscription.aclose()
        await asyncio.to_thread(self.thread.close)


@pytest.fixture
async def each_kind(
    admin: RedisClient, opened: Open, request: pytest.FixtureRequest
) -> AsyncIterator[EachKind]:
    """A connection of each kind, with the password of the file."""
    path = request.getfixturevalue("file")
    kinds = EachKind(opened(redis_username=USER, redis_password_file=path))
    await kinds.start()
    yield kinds
    await kinds.aclose()


async def ids(admin: RedisClient) -> set[bytes]:
    """Return the names of the user's connections."""
    lines = (await admin.execute("CLIENT", "LIST")).splitlines()
    return {line.split()[0] for line in lines if f"user={USER}".encode() in line}


async def auth_count(admin: RedisClient) -> int:
    lines = (await admin.execute("INFO", "commandstats")).decode().splitlines()
    return next((int(line.split("calls=")[1].split(",")[0]) for line in lines if "cmdstat_auth" in line), 0)


# ---------------------------------------------------------------------- files


async def test_open_connections_log_in_again(admin: RedisClient, each_kind: EachKind, file: Path) -> None:
    before, count = await ids(admin), await auth_count(admin)
    assert len(before) == 4
    await change(admin, file)
    await until(lambda: _is(version_of(each_kind.client) == 2))
    await each_kind.use()
    assert await auth_count(admin) == count + 4
    assert len(await ids(admin) - before) == 1, "only the subscription has another connection"
    await each_kind.use()
    assert await auth_count(admin) == count + 4, "each logs in once"


async def _is(value: bool) -> bool:
    return value


async def test_messages_pass_while_a_subscription_logs_in_again(
    admin: RedisClient, each_kind: EachKind, file: Path
) -> None:
    sent, received = itertools.count(), []

    async def publish() -> None:
        while True:
            await admin.execute("PUBLISH", "channel", next(sent))
            await asyncio.sleep(0)

    publishing = asyncio.create_task(publish())
    await change(admin, file)

    async def is_replaced() -> bool:
        message = await each_kind.subscription.next_message(1.0)
        received.append(int(message[1]) if message else -1)
        return each_kind.subscription._login_version == 2 and len(received) > 200

    await until(is_replaced)
    publishing.cancel()
    last = next(sent) - 1
    while received[-1] < last and (message := await each_kind.subscription.next_message(1.0)):
        received.append(int(message[1]))
    assert {*received} - {-1} >= {*range(last)}, "a message was lost"


async def test_refused_password_is_read_again_at_once(
    admin: RedisClient, opened: Open, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credential_origins.FileOrigin, "check_s", 3600.0)
    client = opened(redis_username=USER, redis_password_file=file)
    await client.connect()
    await change(admin, file)
    await admin.execute("CLIENT", "KILL", "USER", USER)

    assert await works_soon(client) == [True]


async def works_soon(client: StoreClient) -> list[bool]:
    """Use a client until it works; return which calls were answered, without those that were cut off."""
    outcomes = []
    async with asyncio.timeout(WAIT_S):
        while True not in outcomes:
            try:
                outcomes.append(await client.execute("PING") == b"PONG")
            except StoreUnavailable as exc:
                if exc.answered or "credentials" in str(exc):
                    outcomes.append(False)
    return outcomes


async def test_wrong_password_in_a_file_ends_no_connection(
    admin: RedisClient, each_kind: EachKind, file: Path, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    before = await ids(admin)
    file.write_text("wrong-Hunter2pass")
    await until(lambda: _is(version_of(each_kind.client) == 2))
    await each_kind.use()
    await each_kind.use()
    assert await ids(admin) == before
    other = opened(redis_username=USER, redis_password_file=file)
    with pytest.raises(StoreUnavailable, match=r"DYN_REDIS_PASSWORD_FILE.*read again"):
        await other.execute("PING")
    kept = [record for record in caplog.records if "keeps its earlier login" in record.getMessage()]
    assert len(kept) == 1
    file.write_text(FIRST)
    await until(lambda: _is(version_of(each_kind.client) == 3))
    await each_kind.use()
    assert await other.execute("PING") == b"PONG"
    assert "Hunter2pass" not in caplog.text


async def test_missing_file_is_told_and_awaited(
    admin: RedisClient, opened: Open, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file.unlink()
    client = opened(redis_username=USER, redis_password_file=file)
    with pytest.raises(StoreUnavailable, match=r"no credentials of Redis.*cannot be read"):
        await client.execute("PING")
    file.write_text(FIRST)

    async def answers() -> bool:
        try:
            return bool(await client.execute("PING") == b"PONG")
        except StoreUnavailable:
            return False

    await until(answers)
    file.unlink()
    await until(lambda: _is("going on with the last ones" in caplog.text))  # the password is not lost
    assert await client.execute("PING") == b"PONG"
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([line for line in lines if "no credentials of Redis" in line.getMessage()]) == 1


async def test_user_is_from_a_file_too(admin: RedisClient, opened: Open, file: Path, tmp_path: Path) -> None:
    user = tmp_path / "user"
    user.write_text(USER)
    client = opened(redis_username_file=user, redis_password_file=file)
    assert await client.execute("ACL", "WHOAMI") == USER.encode()
    assert client.user == USER


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"redis_url": "redis://:x@h", "redis_password": "y"}, "DYN_REDIS_URL has a password"),
        ({"redis_url": "redis://a@h", "redis_username": "b", "redis_password": "y"}, "another one"),
        ({"redis_password": "y", "redis_password_file": "f"}, "give one of"),
        ({"redis_username_file": "f"}, "goes with DYN_REDIS_PASSWORD_FILE"),
        ({"redis_credentials": "x"}, "must be module:name"),
        ({"redis_credentials": "no_such_module:x"}, "cannot be imported"),
        ({"redis_credentials": "os:sep"}, "neither a function"),
    ],
)
def test_login_that_cannot_be_used_is_a_config_error(given: dict[str, str], says: str) -> None:
    settings = StoreSettings.load(**({"redis_url": "redis://h"} | given))
    with pytest.raises(ConfigError, match=says):
        open_client(settings.require_url(), timeout_s=1.0, login=settings.login())


async def test_password_of_the_environment_is_used(admin: RedisClient, opened: Open) -> None:
    client = opened(redis_username=USER, redis_password=FIRST)
    assert await client.execute("ACL", "WHOAMI") == USER.encode()
    assert "Hunter2pass" not in repr(StoreSettings.load(redis_password=FIRST).login()) + repr(client)


# ---------------------------------------------------------------------- providers


def hook(name: str) -> str:
    return f"{__name__}:{name}"


@pytest.mark.parametrize(
    "name", ["provider", "async_provider", "RedisPyProvider", "AsyncRedisPyProvider", "StreamingProvider"]
)
async def test_each_kind_of_provider_is_asked(name: str, admin: RedisClient, opened: Open) -> None:
    Tokens.give(lambda: (USER, FIRST))
    client = opened(redis_credentials=hook(name))
    assert await client.execute("ACL", "WHOAMI") == USER.encode()
    assert client.user == USER
    assert Tokens.count >= 1


async def test_token_is_renewed_before_its_end(admin: RedisClient, opened: Open) -> None:
    lives_s = 12.0
    issued_at: list[float] = []

    def token() -> tuple[str, str, float]:
        issued_at.append(time.time())
        return USER, f"token-{len(issued_at) - 1}-Hunter2pass", issued_at[-1] + lives_s

    for number in range(2):
        await admin.execute("ACL", "SETUSER", USER, f">token-{number}-Hunter2pass")
    Tokens.give(token)
    kinds = EachKind(opened(redis_credentials=hook("provider")))
    await kinds.start()
    before = await ids(admin)
    await until(lambda: _is(version_of(kinds.client) == 2))
    first, second = issued_at
    assert second < first + lives_s, "the first token had ended before there was another"
    await kinds.use()
    assert len(before - await ids(admin)) == 1, "only the subscription has another connection"
    await kinds.aclose()


async def test_token_that_a_provider_brings_is_used(admin: RedisClient, opened: Open) -> None:
    Tokens.give(lambda: ("", FIRST))  # it goes on to say so, as one that remembers a token
    kinds = EachKind(opened(redis_username=USER, redis_credentials=hook("StreamingProvider")))
    await kinds.start()
    count = await auth_count(admin)
    await admin.execute("ACL", "SETUSER", USER, f">{SECOND}", f"<{FIRST}")
    end_ms = (time.time() + 3600) * 1e3
    token = SimpleToken(SECOND, end_ms, time.time() * 1e3, {"oid": USER})
    await asyncio.to_thread(StreamingProvider.made.bring, token)
    await until(lambda: _is(version_of(kinds.client) == 2))
    await kinds.use()
    assert await auth_count(admin) == count + 4
    await admin.execute("CLIENT", "KILL", "USER", USER)  # as after 12 hours
    await until(lambda: _works(kinds.client))
    await kinds.aclose()


async def _works(client: StoreClient) -> bool:
    try:
        return bool(await client.execute("PING") == b"PONG")
    except StoreUnavailable:
        return False


async def test_tokens_of_entra_id_are_renewed(admin: RedisClient, opened: Open) -> None:
    """`redis-entraid` itself; only the service that issues tokens is replaced."""
    entra = pytest.importorskip("redis_entraid.cred_provider")
    manager = pytest.importorskip("redis.auth.token_manager")
    numbers = itertools.count()
    loops: set[asyncio.AbstractEventLoop] = set()

    class Issuer:
        token: SimpleToken | None = None

        def request_token(self, force_refresh: bool = False) -> SimpleToken:
            if force_refresh:
                loops.add(asyncio.get_running_loop())
            if force_refresh or self.token is None or self.token.is_expired():
                now_ms = time.time() * 1e3
                value = f"token-{next(numbers)}-Hunter2pass"
                self.token = SimpleToken(value, now_ms + 4000, now_ms, {"oid": USER})
            return self.token

    for number in range(12):
        await admin.execute("ACL", "SETUSER", USER, f">token-{number}-Hunter2pass")
    config = manager.TokenManagerConfig(0.5, 0, 1000, manager.RetryPolicy(3, 3))
    Tokens.entra = entra.EntraIdCredentialsProvider(Issuer(), config)
    kinds = EachKind(opened(redis_credentials=hook("Tokens.entra")))
    await kinds.start()
    for version in (2, 3):
        await until(lambda: _is(version_of(kinds.client) >= version))  # noqa: B023 - called in this round
        await kinds.use()
    await kinds.aclose()
    for loop in loops:  # its thread lives as long as the process
        loop.call_soon_threadsafe(loop.stop)


def _raises() -> Any:
    raise ValueError(f"the token {FIRST}-is-long-enough-to-be-cut is bad")


def _hangs() -> Any:
    time.sleep(3.0)
    return USER, FIRST


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (_raises, "ValueError"),
        (_hangs, "does not answer in time"),
        (lambda: (USER, FIRST, time.time() - 1), "have ended already"),
        (lambda: {"password": FIRST}, "its answer is not"),
    ],
    ids=["raises", "hangs", "expired", "no answer"],
)
async def test_failing_provider_is_told_once_and_asked_again(
    answers: Callable[[], Any],
    says: str,
    admin: RedisClient,
    opened: Open,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(credentials, "ASK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(credentials, "_log", RateLimitedLog(credentials.logger, pause_s=60.0))
    Tokens.give(answers)
    client = opened(redis_credentials=hook("provider"))
    with pytest.raises(StoreUnavailable, match=says):
        await client.execute("PING")
    for _ in range(50):
        with pytest.raises(StoreUnavailable):
            await client.execute("PING")
    assert Tokens.count <= 20, "calls have pauses"
    Tokens.answers = staticmethod(lambda: (USER, FIRST))
    await until(lambda: _works(client))
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([line for line in lines if "no credentials of Redis" in line.getMessage()]) == 1
    assert "Hunter2pass" not in caplog.text


async def test_failing_renewal_keeps_the_last_token(
    admin: RedisClient, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    Tokens.give(lambda: (USER, FIRST, time.time() + 1.0))
    kinds = EachKind(opened(redis_credentials=hook("provider")))
    await kinds.start()
    before, calls = await ids(admin), Tokens.count
    Tokens.answers = staticmethod(_raises)
    await until(lambda: _is(Tokens.count >= calls + 2))
    await kinds.use()
    assert await ids(admin) == before
    assert "going on with the last ones" in caplog.text
    assert "Hunter2pass" not in caplog.text
    await kinds.aclose()


async def test_hanging_calls_are_bounded(
    admin: RedisClient, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(credentials, "ASK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(credentials, "RETRY_FIRST_S", 0.1)
    monkeypatch.setattr(credentials, "RETRY_CAP_S", 0.1)
    Tokens.give(_hangs)
    client = opened(redis_credentials=hook("provider"))
    with pytest.raises(StoreUnavailable):
        await client.execute("PING")

    async def is_full() -> bool:
        try:
            await client.execute("PING")
        except StoreUnavailable as exc:
            return "calls of it hang" in str(exc)
        return False

    await until(is_full)
    assert Tokens.count == credential_origins.MOST_CALLS_COUNT
