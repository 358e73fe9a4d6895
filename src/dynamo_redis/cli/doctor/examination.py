"""Asks a server everything that the checks judge, and tries what processes do.

It writes one key, `{prefix}:doctor:<random>`, which expires by itself, and `examine` removes it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from dynamo_redis.cli.doctor.providers import Provider, provider_of
from dynamo_redis.cli.doctor.questions import Questions
from dynamo_redis.cli.doctor.rights import missing_rights
from dynamo_redis.cli.roles import Role
from dynamo_redis.config import RedisLogin
from dynamo_redis.errors import StoreError
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.blocking import pack
from dynamo_redis.store.redis.certificate import TlsSession, tls_session
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.redis.present_login import present_login
from dynamo_redis.store.redis.quorum import SentinelView, sentinel_views
from dynamo_redis.store.scripts import Script

SETTINGS: Final = (
    "notify-keyspace-events",
    "maxmemory-policy",
    "appendonly",
    "appendfsync",
    "save",
    "min-replicas-to-write",
    "min-replicas-max-lag",
    "maxclients",
    "timeout",
    "client-output-buffer-limit",
)
"""Settings of the server that are read. CONFIG GET of all would fetch passwords, too."""

TRIPS_MOST_COUNT: Final = 200
TRIPS_LEAST_COUNT: Final = 10
TRIPS_S: Final = 0.06
"""Round trips are measured for this time, within the two counts."""

_KEY_LIVES_MS: Final = 30_000
_BLOCK_S: Final = 2.0
_HINT_S: Final = 0.3

_WRITE: Final = Script.of(
    "doctor_write",
    "local id = redis.call('XADD', KEYS[1], '*', 'f', ARGV[1])\n"
    "redis.call('PEXPIRE', KEYS[1], ARGV[2])\n"
    "return id",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a trial: whether it worked, else why not. `refused`: for lack of a right."""

    works: bool
    reason: str = ""
    refused: bool = False

    @classmethod
    def of(cls, exc: StoreError) -> Outcome:
        return cls(False, str(exc), exc.answer_code == "NOPERM")


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node of a cluster as another node sees it. `master`: the id of its master, or "" if it is one."""

    node_id: str
    address: str
    master: str
    is_failing: bool

    @classmethod
    def of(cls, line: str) -> ClusterNode:
        """Read a line of CLUSTER NODES."""
        node_id, address, flags, master = line.split()[:4]
        words = flags.split(",")
        return cls(
            node_id,
            address.partition("@")[0],
            "" if "master" in words else master,
            bool({"fail", "fail?", "noaddr", "handshake"} & set(words)),
        )


@dataclass(slots=True)
class Examination:
    """All that was learned about a server. A part that it did not show is None, or absent from a mapping.

    `login` is the setting that the password is from, and `login_ends_at` its end, in seconds since 1970, if
    it is known. `trips_s` are the durations of round trips. `clock_ahead_s` is how far the server's clock
    is ahead of this machine's, within half of the shortest trip. `rights`: for each role the commands that
    the user may not send.
    """

    url: str
    prefix: str
    address: str
    user: str
    login: str = ""
    login_ends_at: float | None = None
    provider: Provider | None = None
    info: dict[str, str] | None = None
    config: dict[str, str] = field(default_factory=dict)
    config_refusal: str = ""
    cluster: dict[str, str] | None = None
    nodes: list[ClusterNode] = field(default_factory=list)
    schema: str | None = None
    schema_error: str = ""
    lease_count: int | None = None
    trips_s: list[float] = field(default_factory=list)
    clock_ahead_s: float | None = None
    scripts: Outcome | None = None
    script_hashes: Outcome | None = None
    blocking_read: Outcome | None = None
    wakeup_s: float | None = None
    notifies: bool | None = None
    rights: dict[Role, list[str]] = field(default_factory=dict)
    sentinels: list[SentinelView] = field(default_factory=list)
    tls: TlsSession | None = None
    tls_error: str = ""
    need: dict[str, int] = field(default_factory=dict)

    @property
    def is_tls(self) -> bool:
        return self.url.partition(":")[0].startswith("rediss")

    @property
    def is_local(self) -> bool:
        """True for a server on this machine."""
        host = urlsplit(self.url).hostname or ""
        return self.url.startswith("unix:") or host in ("localhost", "::1") or host.startswith("127.")

    @property
    def is_cluster(self) -> bool:
        """True for a cluster: by its URL, or by what the server says."""
        says = self.info or {}
        return (
            "+cluster" in self.url.partition("://")[0]
            or says.get("cluster_enabled") == "1"
            or says.get("redis_mode") == "cluster"
        )

    @property
    def version(self) -> tuple[int, ...]:
        """The version of Redis whose commands the server has; empty if it is not known."""
        text = (self.info or {}).get("redis_version", "")
        return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


async def examine(
    url: str, prefix: str, *, timeout_s: float, need: dict[str, int], login: RedisLogin | None = None
) -> Examination:
    """Examine a server. Raises StoreError if it cannot be reached, and ConfigError for a wrong URL."""
    client = open_client(url, timeout_s=timeout_s, client_name="dynamo-redis-doctor", login=login)
    key = RegistryKeys(prefix).structure(f"doctor:{secrets.token_hex(8)}")
    seen = Examination(url, prefix, client.address, client.user, need=need)
    seen.provider = provider_of(urlsplit(url).hostname or "")
    questions = Questions(client.sending(), key)
    try:
        await questions.connect()
        seen.user = client.user  # a provider names it at the first connection
        seen.login, seen.login_ends_at = present_login(url, login)
        tls = asyncio.create_task(_see_tls(seen, timeout_s, login))
        seen.sentinels = await sentinel_views(url, timeout_s)
        await _ask(questions, seen)
        await _measure(questions, seen)
        await _try_scripts(questions, seen, key)
        await _try_blocking_read(client, questions, seen, key)
        await _try_notifications(client, seen)
        unused = {"role"} if not seen.sentinels else set()
        unused |= {"cluster|slots", "asking"} if not seen.is_cluster else set()
        seen.rights = await missing_rights(questions, seen.user, prefix, unused)
        await tls
    finally:
        await questions.ask([("UNLINK", key)])
        await questions.aclose()
        await client.aclose()
    return seen


async def _ask(questions: Questions, seen: Examination) -> None:
    keys = RegistryKeys(seen.prefix)
    info, cluster, nodes, schema, leases, *settings = await questions.ask(
        [
            ("INFO",),
            ("CLUSTER", "INFO"),
            ("CLUSTER", "NODES"),
            ("HMGET", keys.meta, "schema"),
            ("ZCARD", keys.structure("leases")),
            *(("CONFIG", "GET", name) for name in SETTINGS),
        ]
    )
    if isinstance(info, bytes):
        seen.info = _parse(info)
    if isinstance(cluster, bytes):
        seen.cluster = _parse(cluster)
    if isinstance(nodes, bytes):
        seen.nodes = [ClusterNode.of(line) for line in nodes.decode().splitlines() if line.count(" ") > 6]
    if isinstance(schema, StoreError):
        seen.schema_error = str(schema)
    elif schema and schema[0] is not None:
        seen.schema = schema[0].decode("utf-8", "replace")
    if isinstance(leases, int):
        seen.lease_count = max(0, leases - 1)  # the incarnation's mark is a member, too
    for answer in settings:
        if isinstance(answer, StoreError):
            seen.config_refusal = "CONFIG GET is refused"
        elif answer:
            name, value = (word.decode("utf-8", "replace") for word in answer[:2])
            seen.config[name] = value


def _parse(text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


async def _measure(questions: Questions, seen: Examination) -> None:
    """Measure round trips, and compare the clocks at the shortest one."""
    end = time.perf_counter() + TRIPS_S
    shortest_s = float("inf")
    while len(seen.trips_s) < TRIPS_MOST_COUNT:
        if len(seen.trips_s) >= TRIPS_LEAST_COUNT and time.perf_counter() >= end:
            return
        began = time.perf_counter()
        (answer,) = await questions.ask([("TIME",)])
        took_s = time.perf_counter() - began
        seen.trips_s.append(took_s)
        if took_s < shortest_s and isinstance(answer, list):
            shortest_s = took_s
            seen.clock_ahead_s = int(answer[0]) + int(answer[1]) / 1e6 - (time.time() - took_s / 2)


async def _try_scripts(questions: Questions, seen: Examination, key: str) -> None:
    arguments = (1, key, "x", _KEY_LIVES_MS)
    by_source, by_hash = await questions.ask(
        [("EVAL", _WRITE.source, *arguments), ("EVALSHA", _WRITE.sha, *arguments)]
    )
    seen.scripts = Outcome.of(by_source) if isinstance(by_source, StoreError) else Outcome(True)
    seen.script_hashes = Outcome.of(by_hash) if isinstance(by_hash, StoreError) else Outcome(True)


async def _try_blocking_read(client: StoreClient, questions: Questions, seen: Examination, key: str) -> None:
    """Let a second connection wait for an entry that this one writes then."""
    if seen.scripts is None or not seen.scripts.works:
        return
    waiting = client.blocking(key)
    try:
        newest = pack("XREVRANGE", key, "+", "-", "COUNT", 1)
        try:
            last = await waiting.execute(newest, block_s=0.0)
        except StoreError as exc:
            seen.blocking_read = Outcome.of(exc)
            return
        after = last[0][0] if last else b"0-0"
        read = pack("XREAD", "COUNT", 1, "BLOCK", round(_BLOCK_S * 1000), "STREAMS", key, after)
        task = asyncio.create_task(waiting.execute(read, block_s=_BLOCK_S))
        # The wait begins before the write if the server takes commands in the order of their arrival; an
        # answer that is late or empty shows otherwise.
        await asyncio.sleep(2 * min(seen.trips_s, default=0.0) + 0.002)
        was_waiting = not task.done()
        began = time.perf_counter()
        await questions.ask([("EVAL", _WRITE.source, 1, key, "y", _KEY_LIVES_MS)])
        try:
            found = await task
        except StoreError as exc:
            seen.blocking_read = Outcome.of(exc)
            return
        seen.wakeup_s = time.perf_counter() - began
        works = bool(found) and was_waiting
        seen.blocking_read = Outcome(works, "" if works else "XREAD BLOCK returned without waiting")
    finally:
        await waiting.aclose()


async def _try_notifications(client: StoreClient, seen: Examination) -> None:
    """Let a key expire and wait for its notification, if the setting cannot be read.

    The key is that of a lease that does not exist, since users may subscribe to no other channel: processes
    that hear of it reap once, and find nothing."""
    if "notify-keyspace-events" in seen.config or seen.scripts is None or not seen.scripts.works:
        return
    keys = RegistryKeys(seen.prefix)
    key = keys.structure(f"lease:{secrets.randbits(63):016x}")
    try:
        subscription = await client.subscribe(keys.lease_channel, beside=key)
    except StoreError:
        return
    try:
        await client.execute("SET", key, "", "PX", 1)
        await asyncio.sleep(0.003)
        await client.execute("EXISTS", key)  # expires it now
        deadline = time.monotonic() + _HINT_S
        seen.notifies = False
        while not seen.notifies and (left_s := deadline - time.monotonic()) > 0:
            message = await subscription.next_message(left_s)
            seen.notifies = message is not None and message[1] == b"expired"
    except StoreError:
        seen.notifies = None
    finally:
        await subscription.aclose()


async def _see_tls(seen: Examination, timeout_s: float, login: RedisLogin | None) -> None:
    if not seen.is_tls:
        return
    try:
        seen.tls = await tls_session(seen.url, timeout_s, login)
    except StoreError as exc:
        seen.tls_error = str(exc)
