"""Scripts of the registry that stop in their middle, since their user has lost a right."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.store.base import Compare, DeleteOp, LeaseId, Put, PutOp, Record
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.change_log import parse_change
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.registry.scripts_api import KeyValue, OwnedPut

from .conftest import SERVERS

ME, OTHER = LeaseId(1), LeaseId(2)
COMMANDS = ["xadd", "hset", "zadd", "zrem", "hdel"]


@dataclass
class Bench:
    """A registry with one user that has all rights, and one that loses some."""

    kv: KeyValue
    limited: KeyValue
    url: str
    user: str

    async def deny(self, command: str) -> None:
        await self.kv.client.execute("ACL", "SETUSER", self.user, f"-{command}")

    async def allow(self) -> None:
        await self.kv.client.execute("ACL", "SETUSER", self.user, "+@all")

    async def interrupt(self, command: str, call: Callable[[KeyValue], Awaitable[object]]) -> None:
        """Run a call whose script fails at that command, in its middle if it gets there.

        The clock has just been kept, so that its first command is not the one of keeping it.
        """
        for _ in range(50):
            before = await self.kv.client.execute("XLEN", self.kv.keys.log)
            await self.kv.tick()
            await self.deny(command)
            try:
                await call(self.limited)
                return
            except StoreError:
                logged = await self.kv.client.execute("XLEN", self.kv.keys.log) > before
            finally:
                await self.allow()
            if logged or command == "xadd":
                return
        pytest.fail(f"no script came past its first command without {command}")

    async def check(self) -> dict[str, Record]:
        """Assert that all structures agree with one another and with the log; return the records."""
        names = self.kv.keys.structure
        execute = self.kv.client.execute
        packed = dict(pairs(await execute("HGETALL", names("kv"))))
        incarnation = packed.pop(b"").decode()
        index = [key for key in await execute("ZRANGE", names("idx"), 0, -1) if not key.startswith(b"\0")]
        assert sorted(index) == sorted(packed), "idx and kv"
        leased = [name for name in await execute("ZRANGE", names("lk"), 0, -1) if not name.startswith(b"\0")]
        records = {key: msgpack.unpackb(value, raw=True) for key, value in packed.items()}
        assert sorted(leased) == sorted(r[3] + b"\0" + key for key, r in records.items() if r[3]), "lk and kv"
        entries = [parse_change(*entry) for entry in await execute("XRANGE", names("log"), "-", "+")]
        inc, rev, operation = await execute("HMGET", names("meta"), "inc", "rev", "op")
        assert (inc.decode(), rev.decode()) == (incarnation, entries[-1].revision), "meta and log"
        assert operation.decode() == entries[-1].operation
        for before, after in itertools.pairwise(entries):
            assert after.previous == (before.revision, before.operation), "the log's chain"
        replayed: dict[str, Record] = {}
        for change in entries:
            if change.record is not None:
                replayed[change.key] = change.record
            else:
                replayed.pop(change.key, None)
        assert {key.encode(): (r.mod_revision.encode(), r.value) for key, r in replayed.items()} == {
            key: (fields[0], fields[4]) for key, fields in records.items()
        }, "log and kv"
        return replayed


def pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@pytest.fixture(params=SERVERS)
async def bench(
    request: pytest.FixtureRequest, server_urls: Callable[[str], str], dynamo_redis_prefix: str
) -> AsyncIterator[Bench]:
    url = server_urls(request.param)
    user = f"limited-{secrets.token_hex(4)}"
    admin = RedisClient(url, timeout_s=5.0)
    await admin.execute("ACL", "SETUSER", user, "on", ">pw", "~*", "&*", "+@all")
    separator = "&" if "?" in url else "?"
    limited_url = f"{url}{separator}username={user}&password=pw"
    limited = RedisClient(limited_url, timeout_s=5.0)
    keys = RegistryKeys(dynamo_redis_prefix)
    made = Bench(KeyValue(admin, keys), KeyValue(limited, keys), limited_url, user)
    await made.kv.initialize()
    yield made
    await limited.aclose()
    await admin.execute("ACL", "DELUSER", user)
    await admin.aclose()


async def fill(kv: KeyValue) -> None:
    await kv.write([PutOp("k/free", b"1"), PutOp("k/gone", b"1")])
    await kv.write([OwnedPut("k/mine", b"1"), OwnedPut("k/mine2", b"1")], lease=ME, ttl_s=60)
    await kv.write([OwnedPut("k/theirs", b"1")], lease=OTHER, ttl_s=60)


CALLS: dict[str, Callable[[KeyValue], Awaitable[object]]] = {
    "new": lambda kv: kv.write([PutOp("k/new", b"2")]),
    "over": lambda kv: kv.write([PutOp("k/free", b"2")]),
    "leased": lambda kv: kv.write([OwnedPut("k/new", b"2")], lease=ME),
    "taken": lambda kv: kv.write([OwnedPut("k/theirs", b"2")], lease=ME),
    "delete": lambda kv: kv.write([DeleteOp("k/mine")]),
    "all": lambda kv: kv.write(
        [
            PutOp("k/new", b"2"),
            DeleteOp("k/gone"),
            PutOp("k/free", b"2"),
            DeleteOp("k/new"),
            PutOp("k/new", b"3"),
        ]
    ),
    "revoke": lambda kv: kv.revoke(ME),
}


BEGINNINGS = {("hset", "delete"), ("hset", "revoke"), ("zadd", "revoke")}
"""Calls that begin with the command: without it they have no effect."""


@pytest.mark.parametrize(("command", "call"), sorted({*itertools.product(COMMANDS, CALLS)} - BEGINNINGS))
async def test_an_interrupted_script_leaves_a_whole_registry(bench: Bench, command: str, call: str) -> None:
    await fill(bench.kv)
    incarnation = (await bench.kv.initialize()).incarnation
    await bench.interrupt(command, CALLS[call])
    shown = (await bench.kv.snapshot("k/"))[0].records
    found = await bench.kv.read(["k/free", "k/gone", "k/mine", "k/theirs", "k/new"])
    await bench.kv.tick()
    if call == "revoke":
        await bench.kv.revoke(ME)
    else:
        expected = await bench.check()
        assert {record.key: record for record in shown} == expected, "a snapshot shows what is logged"
        assert found.records.items() <= expected.items(), "and so does a read"
        assert expected.keys() - found.records.keys() <= {"k/mine2"}
        if call == "all":
            done = expected["k/free"].value == b"2"
            assert ("k/gone" in expected, "k/new" in expected) == (not done, done), "whole or not at all"
    await bench.check()
    assert (await bench.kv.initialize()).incarnation == incarnation


async def test_watchers_agree_whatever_is_interrupted(bench: Bench) -> None:
    registry = RedisRegistry(
        StoreSettings.load(redis_url=bench.url, prefix=bench.kv.keys.prefix, lease_ttl_s=10)
    )
    await registry.start()
    state: dict[str, bytes] = {}
    resyncs: list[str] = []

    async def follow() -> None:
        async for batch in registry.watch("k/"):
            resyncs.extend([batch.resync] if batch.resync else [])
            for event in batch.events:
                if isinstance(event, Put):
                    state[event.record.key] = event.record.value
                else:
                    del state[event.key]

    following = asyncio.create_task(follow())
    rng = random.Random(5)
    for step in range(150):
        if step % 10 == 0:
            await bench.allow()
        elif rng.random() < 0.5:
            await bench.deny(rng.choice(COMMANDS))
        names = [f"k/{n}" for n in rng.sample(range(8), 3)]
        ops: list[Any] = [
            PutOp(name, b"%d" % step) if rng.random() < 0.6 else DeleteOp(name) for name in names
        ]
        lease = rng.choice([None, ME])
        try:
            if rng.random() < 0.1:
                await bench.limited.revoke(ME)
            else:
                compares = [Compare("k/absent", None)] if rng.random() < 0.3 else []
                await bench.limited.write(ops, compares=compares, lease=lease, ttl_s=60 if lease else 0.0)
        except StoreError:
            pass
    await bench.allow()
    await bench.kv.tick()
    expected = {key: record.value for key, record in (await bench.check()).items()}
    async with asyncio.timeout(20):
        while state != expected:
            await asyncio.sleep(0.02)
    assert resyncs == []
    await registry.aclose()
    await following


async def test_a_foreign_entry_in_the_log_is_no_wipe(bench: Bench) -> None:
    await fill(bench.kv)
    before = await bench.kv.initialize()
    await bench.kv.client.execute("XADD", bench.kv.keys.log, "*", "who", "knows")
    assert len((await bench.kv.snapshot("k/"))[0].records) == 5
    await bench.kv.write([PutOp("k/new", b"")])
    await bench.check()
    assert (await bench.kv.initialize()).incarnation == before.incarnation


async def test_names_without_records_are_skipped_and_go(bench: Bench) -> None:
    await fill(bench.kv)
    structure, execute = bench.kv.keys.structure, bench.kv.client.execute
    await execute("ZADD", structure("idx"), 0, "k/hole")
    await execute("ZADD", structure("lk"), 0, "1\0k/nothing", 0, "1\0k/theirs")
    assert len((await bench.kv.snapshot("k/"))[0].records) == 5
    assert not (await bench.kv.write([DeleteOp("k/hole")])).change_count
    await bench.kv.revoke(ME)
    assert sorted(await bench.check()) == ["k/free", "k/gone", "k/theirs"]
