"""The registry when Redis goes away, loses its data, or is replaced."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.store.base import Delete, DeleteCause, LeaseId, PutOp
from dynamo_redis.store.keys import STRUCTURES, RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.registry.scripts_api import KeyValue, OwnedPut
from dynamo_redis.store.server import EmbeddedServer
from faults.proxy import Conditions
from tests.processes import PROGRAMS


async def test_restart_with_data_causes_no_resync(
    own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any
) -> None:
    worker = await open_registry(own_redis_server.url)
    watcher = await open_registry(own_redis_server.url)
    view = await mirror(watcher, "i/")
    await worker.register("i/1", b"v")
    await view.until_state({"i/1": b"v"})
    await own_redis_server.stop()
    await asyncio.sleep(0.5)
    assert not watcher.connected
    assert view.state == {"i/1": b"v"}, "a watch is silent while the server is away"
    with pytest.raises(StoreUnavailable):
        await watcher.get("i/1")
    await own_redis_server.start()
    async with asyncio.timeout(30):
        while not (watcher.connected and worker.connected):
            await asyncio.sleep(0.02)
    await watcher.put("i/2", b"w")
    await view.until_state({"i/1": b"v", "i/2": b"w"})
    await asyncio.sleep(2.5)  # beyond the TTL
    assert view.state == {"i/1": b"v", "i/2": b"w"}
    assert view.resyncs == []
    assert worker.lease_losses == 0
    assert watcher.outages >= 1


async def test_after_an_empty_restart_all_is_back_within_5_s(
    own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any
) -> None:
    workers = [await open_registry(own_redis_server.url) for _ in range(4)]
    watcher = await open_registry(own_redis_server.url)
    view = await mirror(watcher, "i/")
    state = {f"i/{n}": b"v" for n in range(4)}
    for n, worker in enumerate(workers):
        await worker.register(f"i/{n}", b"v")
    await view.until_state(state)
    await own_redis_server.stop()
    own_redis_server.erase()
    await asyncio.sleep(1.0)
    await own_redis_server.start()
    await view.until(lambda: bool(view.resyncs), 5.0)
    await view.until_state(state, 5.0)
    assert [worker.lease_losses for worker in workers] == [1, 1, 1, 1]
    await asyncio.sleep(2.5)
    assert view.state == state


async def test_killed_server_loses_no_acknowledged_registration(
    own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any
) -> None:
    worker = await open_registry(own_redis_server.url)
    watcher = await open_registry(own_redis_server.url)
    view = await mirror(watcher, "i/")
    registrations = [await worker.register(f"i/{n}", b"0") for n in range(20)]
    await view.until(lambda: len(view.state) == 20)
    await asyncio.sleep(1.2)  # on disk
    for registration in registrations:
        await registration.update(b"1")  # perhaps not on disk yet
    await own_redis_server.kill()
    await own_redis_server.start()
    await view.until_state({f"i/{n}": b"1" for n in range(20)}, 5.0)
    async with asyncio.timeout(30):
        while True:
            records = (await watcher.get_prefix("i/")).records
            if {record.value for record in records} == {b"1"} and len(records) == 20:
                break
            await asyncio.sleep(0.05)


async def test_flushall_is_a_wipe(own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any) -> None:
    worker = await open_registry(own_redis_server.url)
    view = await mirror(await open_registry(own_redis_server.url), "i/")
    await worker.register("i/1", b"v")
    await worker.put("i/free", b"gone")
    await view.until_state({"i/1": b"v", "i/free": b"gone"})
    client = RedisClient(own_redis_server.url, timeout_s=1.0)
    await client.execute("FLUSHALL")
    await client.aclose()
    await view.until(lambda: bool(view.resyncs))
    await view.until_state({"i/1": b"v"})


@pytest.mark.parametrize("structure", STRUCTURES)
async def test_losing_any_one_structure_is_a_wipe(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any, mirror: Any, structure: str
) -> None:
    worker = await open_registry(dynamo_redis_url)
    watcher = await open_registry(dynamo_redis_url)
    view = await mirror(watcher, "i/")
    await worker.register("i/1", b"v")
    await view.until_state({"i/1": b"v"})
    await watcher._client.execute("DEL", RegistryKeys(dynamo_redis_prefix).structure(structure))
    await view.until(lambda: bool(view.resyncs))
    await view.until_state({"i/1": b"v"})
    assert (await watcher.get_prefix("")).records[0].lease == worker.lease_id
    await worker.put("i/2", b"w")
    await view.until_state({"i/1": b"v", "i/2": b"w"})


async def test_a_trimmed_log_costs_a_resync_and_nothing_else(
    own_redis_server: EmbeddedServer,
    dynamo_redis_prefix: str,
    open_registry: Any,
    open_proxy: Any,
    mirror: Any,
) -> None:
    proxy = await open_proxy(own_redis_server.url)
    worker = await open_registry(own_redis_server.url)
    view = await mirror(await open_registry(proxy.url), "i/")
    await worker.register("i/1", b"v")
    await worker.put("i/2", b"gone unseen")
    await view.until(lambda: len(view.state) == 2)
    proxy.refuse = True
    proxy.cut()
    await worker.delete("i/2")
    await worker.put("i/3", b"w")
    await worker._client.execute("XTRIM", RegistryKeys(dynamo_redis_prefix).log, "MAXLEN", 1)
    proxy.refuse = False
    await view.until_state({"i/1": b"v", "i/3": b"w"})
    assert len(view.resyncs) == 1
    assert "does not connect" in view.resyncs[0]
    await worker._client.execute("XTRIM", RegistryKeys(dynamo_redis_prefix).log, "MAXLEN", 0)
    await worker.put("i/4", b"x")
    await view.until_state({"i/1": b"v", "i/3": b"w", "i/4": b"x"})
    assert len(view.resyncs) == 1, "an empty log is not a lost one"
    assert worker.lease_losses == 0


async def test_a_frozen_server_costs_no_lease(
    own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any
) -> None:
    worker = await open_registry(own_redis_server.url)
    view = await mirror(await open_registry(own_redis_server.url), "i/")
    await worker.register("i/1", b"v")
    await view.until_state({"i/1": b"v"})
    own_redis_server.send_signal(signal.SIGSTOP)
    await asyncio.sleep(3.0)  # 1.5 TTL
    own_redis_server.send_signal(signal.SIGCONT)
    await worker.put("i/2", b"w")
    await view.until_state({"i/1": b"v", "i/2": b"w"})
    await asyncio.sleep(1.0)
    assert view.state == {"i/1": b"v", "i/2": b"w"}
    assert worker.lease_losses == 0


WORKER = PROGRAMS / "registry_worker.py"


async def test_a_killed_worker_process_expires(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any, mirror: Any
) -> None:
    view = await mirror(await open_registry(dynamo_redis_url), "i/")
    process = subprocess.Popen(
        [sys.executable, WORKER, dynamo_redis_url, dynamo_redis_prefix], stdout=subprocess.PIPE
    )
    try:
        await view.until_state({"i/killed": b"v"})
        await asyncio.sleep(2.0)
        assert view.state == {"i/killed": b"v"}
    finally:
        process.kill()
        process.communicate()
    killed_at = time.monotonic()
    await view.until_state({})
    assert time.monotonic() - killed_at < 1.5 + 8
    assert [event.cause for event in view.batches[-1].events if isinstance(event, Delete)] == [
        DeleteCause.EXPIRED
    ]


async def test_many_leases_end_in_bounded_calls(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any, mirror: Any
) -> None:
    watcher = await open_registry(dynamo_redis_url)
    view = await mirror(watcher, "i/")
    kv = KeyValue(watcher._client, RegistryKeys(dynamo_redis_prefix))

    async def write(first: int) -> None:
        for n in range(first, 300, 10):
            await kv.write([OwnedPut(f"i/{n}", b"")], lease=LeaseId(n + 1), ttl_s=1.5)

    await asyncio.gather(*map(write, range(10)))
    assert len((await watcher.get_prefix("i/")).records) > 200
    await view.until(lambda: not view.state and len(view.batches) > 1, 30.0)
    deletes = [event for batch in view.batches for event in batch.events if isinstance(event, Delete)]
    assert len(deletes) == 300, "each delete is logged once"
    assert (await watcher.get_prefix("i/")).records == ()
    log = RegistryKeys(dynamo_redis_prefix).log
    entries = await watcher._client.execute("XRANGE", log, "-", "+")
    by_call: dict[bytes, int] = {}
    for _, fields in entries:
        if fields[1] == b"x":
            by_call[fields[13]] = by_call.get(fields[13], 0) + 1
    assert max(by_call.values()) <= 64


# --------------------------------------------------------------------------- connections


async def test_watchers_equal_the_server_after_random_cuts(
    dynamo_redis_url: str, open_registry: Any, open_proxy: Any, mirror: Any
) -> None:
    rng = random.Random(7)
    proxies = [await open_proxy(dynamo_redis_url) for _ in range(3)]
    watchers = [await open_registry(proxy.url) for proxy in proxies]
    views = [await mirror(watcher, "k/") for watcher in watchers]
    writer = await open_registry(dynamo_redis_url)
    for step in range(200):
        key = f"k/{rng.randrange(20)}"
        if rng.random() < 0.3:
            await writer.delete(key)
        else:
            await writer.put(key, b"%d" % step)
        if step % 20 == 10:
            rng.choice(proxies).cut()
        if step % 7 == 3:
            rng.choice(proxies).cut_one()
    truth = {record.key: record.value for record in (await writer.get_prefix("k/")).records}
    for view in views:
        await view.until_state(truth)
        assert view.resyncs == [], "reading goes on where it stopped"


async def test_write_with_lost_answer_happens_once(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any, open_proxy: Any, mirror: Any
) -> None:
    proxy = await open_proxy(dynamo_redis_url)
    writer = await open_registry(proxy.url, timeout_s=2.0)
    watcher = await open_registry(dynamo_redis_url)
    view = await mirror(watcher, "k/")
    await writer.put("k/n", b"0")
    proxy.conditions = Conditions(swallow_answers=True)
    writing = asyncio.create_task(writer.create("k/1", b"mine"))
    await view.until(lambda: "k/1" in view.state and proxy.has_swallowed)
    proxy.heal()
    record = await watcher.get("k/1")
    assert record is not None
    assert await writing == record.mod_revision, "the first answer, not KeyExists"
    assert record.version == 1


async def test_a_registration_without_an_answer_leaves_nothing_behind(
    dynamo_redis_url: str, open_registry: Any, open_proxy: Any, mirror: Any
) -> None:
    proxy = await open_proxy(dynamo_redis_url)
    worker = await open_registry(proxy.url, timeout_s=0.5, ttl_s=5)
    view = await mirror(await open_registry(dynamo_redis_url), "k/")
    await worker.register("k/kept", b"v")
    proxy.conditions = Conditions(swallow_answers=True)
    with pytest.raises(StoreUnavailable):
        await worker.register("k/1", b"v")
    await view.until(lambda: "k/1" in view.state)  # it did arrive
    proxy.heal()
    await view.until_state({"k/kept": b"v"}, 4.0)
    await worker.register("k/1", b"again", exclusive=True)
    await view.until_state({"k/kept": b"v", "k/1": b"again"})


async def test_exclusive_registration_with_lost_answer_can_be_repeated(
    dynamo_redis_url: str, open_registry: Any, open_proxy: Any, mirror: Any
) -> None:
    proxy = await open_proxy(dynamo_redis_url)
    worker = await open_registry(proxy.url, timeout_s=0.5, ttl_s=5)
    view = await mirror(await open_registry(dynamo_redis_url), "k/")
    worker._registrations._delete_strays = _do_nothing  # too late to help
    proxy.conditions = Conditions(swallow_answers=True)
    with pytest.raises(StoreUnavailable):
        await worker.register("k/1", b"v", exclusive=True)
    await view.until(lambda: "k/1" in view.state)
    proxy.heal()
    await worker.register("k/1", b"again", exclusive=True)
    await view.until_state({"k/1": b"again"})


async def _do_nothing(*_: object) -> None:
    pass


async def test_a_key_deleted_while_its_owner_was_away_stays_deleted(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any, open_proxy: Any, mirror: Any
) -> None:
    proxy = await open_proxy(dynamo_redis_url)
    worker = await open_registry(proxy.url, timeout_s=0.5, ttl_s=5)
    other = await open_registry(dynamo_redis_url)
    view = await mirror(other, "k/")
    lost: list[str] = []
    await worker.register("k/1", b"v", on_lost=lost.append)
    await worker.register("k/2", b"v")
    proxy.refuse = True
    proxy.cut()
    await other.delete("k/1")
    await other.put("k/3", b"w")
    # Nor does the log show it to the owner.
    await other._client.execute("XTRIM", RegistryKeys(dynamo_redis_prefix).log, "MAXLEN", 1)
    proxy.refuse = False
    async with asyncio.timeout(30):
        while not lost:
            await asyncio.sleep(0.01)
    assert lost == ["deleted"]
    await asyncio.sleep(0.5)
    assert view.state == {"k/2": b"v", "k/3": b"w"}


async def test_an_update_without_an_answer_is_repaired(
    dynamo_redis_url: str, open_registry: Any, open_proxy: Any, mirror: Any
) -> None:
    proxy = await open_proxy(dynamo_redis_url)
    worker = await open_registry(proxy.url, timeout_s=0.5, ttl_s=5)
    view = await mirror(await open_registry(dynamo_redis_url), "k/")
    registration = await worker.register("k/1", b"1")
    proxy.refuse = True
    proxy.cut()
    with pytest.raises(StoreUnavailable):
        await registration.update(b"2")
    assert registration.lost is None
    proxy.refuse = False
    await view.until_state({"k/1": b"2"}, 5.0)


async def test_a_cancelled_registration_leaves_nothing_behind(
    dynamo_redis_url: str, open_registry: Any, mirror: Any
) -> None:
    worker = await open_registry(dynamo_redis_url)
    view = await mirror(await open_registry(dynamo_redis_url), "k/")
    for n in range(20):
        task = asyncio.create_task(worker.register(f"k/{n}", b"v"))
        await asyncio.sleep(0.0001 * (n % 5))
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            await task.result().unregister()
    await worker.register("k/end", b"v")
    await view.until_state({"k/end": b"v"})
    await asyncio.sleep(0.5)
    assert view.state == {"k/end": b"v"}
    assert [record.key for record in (await worker.get_prefix("k/")).records] == ["k/end"]


async def test_a_start_that_failed_can_be_repeated(
    own_redis_server: EmbeddedServer, dynamo_redis_prefix: str
) -> None:
    registry = RedisRegistry(
        StoreSettings.load(redis_url=own_redis_server.url, prefix=dynamo_redis_prefix, command_timeout_s=1.0)
    )
    await own_redis_server.stop()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="is it running"):
            await registry.start()
    await own_redis_server.start()
    await registry.start()
    await registry.start()  # no effect
    await registry.register("i/1", b"v")
    assert await registry.get("i/1") is not None
    await registry.aclose()


async def test_registrations_that_wait_end_within_one_timeout(
    own_redis_server: EmbeddedServer, open_registry: Any
) -> None:
    registry = await open_registry(own_redis_server.url, timeout_s=2.0)
    held = await registry.register("i/0", b"v")
    own_redis_server.send_signal(signal.SIGSTOP)
    began_at = time.monotonic()
    results = await asyncio.gather(
        *(registry.register(f"i/{number}", b"v") for number in range(1, 9)),
        held.update(b"w"),
        return_exceptions=True,
    )
    took_s = time.monotonic() - began_at
    own_redis_server.send_signal(signal.SIGCONT)
    assert all(isinstance(result, StoreUnavailable) for result in results), results
    assert took_s < 8.0, "one after the other they need 16 s and more"
    await registry.register("i/9", b"v")


async def test_unreadable_log_is_asked_for_with_pauses(
    own_redis_server: EmbeddedServer, open_registry: Any, mirror: Any
) -> None:
    registry, writer = await open_registry(own_redis_server.url), await open_registry(own_redis_server.url)
    view = await mirror(registry, "i/")
    admin = RedisClient(own_redis_server.url, timeout_s=5.0)
    await admin.execute("ACL", "SETUSER", "default", "-xread")
    async with asyncio.timeout(30):
        while registry.connected:
            await asyncio.sleep(0.02)
    before = await _connections_count(admin)
    for _ in range(400):
        await asyncio.sleep(0.01)
        assert not registry.connected, "a log that cannot be read is not followed"
    made_count = await _connections_count(admin) - before
    assert made_count <= 30, "two processes, one connection a second each; more at first"
    await admin.execute("ACL", "SETUSER", "default", "+xread")
    await writer.put("i/1", b"v")
    await view.until_state({"i/1": b"v"})
    assert registry.connected
    await admin.aclose()


async def _connections_count(client: RedisClient) -> int:
    """Return the number of connections that the server has accepted so far."""
    lines = (await client.execute("INFO", "stats")).decode().splitlines()
    (count,) = [line.partition(":")[2] for line in lines if line.startswith("total_connections_received:")]
    return int(count)


# --------------------------------------------------------------------------- a lossy failover


@pytest.fixture
async def replica(own_redis_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A replica of `own_redis_server`, in sync."""
    directory = tmp_path / "replica"
    directory.mkdir()
    port = own_redis_server.url.rpartition(":")[2]
    async with EmbeddedServer(directory, port=0, settings={"replicaof": ("127.0.0.1", str(port))}) as server:
        client = RedisClient(server.url, timeout_s=1.0)
        async with asyncio.timeout(30):
            while b"master_link_status:up" not in await client.execute("INFO", "replication"):
                await asyncio.sleep(0.05)
        await client.aclose()
        yield server


async def _promote(server: EmbeddedServer) -> None:
    client = RedisClient(server.url, timeout_s=1.0)
    await client.execute("REPLICAOF", "NO", "ONE")
    await client.aclose()


async def _replicated(primary: EmbeddedServer, replica: EmbeddedServer, key: str) -> None:
    """Wait until the replica holds the key as the primary does."""
    clients = [RedisClient(server.url, timeout_s=1.0) for server in (primary, replica)]
    async with asyncio.timeout(30):
        while True:
            here, there = [await client.execute("DUMP", key) for client in clients]
            if here == there:
                break
            await asyncio.sleep(0.02)
    for client in clients:
        await client.aclose()


async def test_a_failover_that_loses_the_tail_is_repaired(
    dynamo_redis_prefix: str,
    own_redis_server: EmbeddedServer,
    replica: EmbeddedServer,
    open_registry: Any,
    open_proxy: Any,
    mirror: Any,
) -> None:
    proxy = await open_proxy(own_redis_server.url)
    worker = await open_registry(proxy.url)
    watcher = await open_registry(proxy.url)
    view = await mirror(watcher, "")
    old = await worker.register("i/old", b"1")
    await watcher.put("free/kept", b"v")
    await view.until(lambda: len(view.state) == 2)
    await _replicated(own_redis_server, replica, RegistryKeys(dynamo_redis_prefix).log)
    await _promote(replica)  # from here on the replica misses what the primary acknowledges
    await worker.register("i/new", b"v")
    await old.update(b"2")
    await watcher.put("free/lost", b"v")
    await view.until_state({"i/old": b"2", "i/new": b"v", "free/kept": b"v", "free/lost": b"v"})
    proxy.target = replica.url
    proxy.cut()
    await view.until_state({"i/old": b"2", "i/new": b"v", "free/kept": b"v"})
    assert view.resyncs
    assert worker.lease_losses == 0
    records = {record.key: record for record in (await watcher.get_prefix("")).records}
    assert {key: record.value for key, record in records.items()} == view.state
    assert records["i/new"].lease == worker.lease_id


async def test_failover_without_later_writes_is_noticed(
    dynamo_redis_prefix: str,
    own_redis_server: EmbeddedServer,
    replica: EmbeddedServer,
    open_registry: Any,
    open_proxy: Any,
    mirror: Any,
) -> None:
    proxy = await open_proxy(own_redis_server.url)
    watcher = await open_registry(proxy.url)
    view = await mirror(watcher, "")
    await watcher.put("free/kept", b"v")
    await _replicated(own_redis_server, replica, RegistryKeys(dynamo_redis_prefix).log)
    await _promote(replica)
    await watcher.put("free/lost", b"v")
    await view.until_state({"free/kept": b"v", "free/lost": b"v"})
    proxy.target = replica.url
    proxy.cut()
    await view.until_state({"free/kept": b"v"})
    assert view.resyncs == ["the registry's history was rewound"]


async def test_a_lost_write_is_found_by_the_keepalive_alone(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any, mirror: Any
) -> None:
    worker = await open_registry(dynamo_redis_url, ttl_s=1.0)
    view = await mirror(await open_registry(dynamo_redis_url), "i/")
    await worker.register("i/1", b"v")
    await view.until_state({"i/1": b"v"})
    keys = RegistryKeys(dynamo_redis_prefix)
    lease = f"{worker.lease_id:x}"
    # As after a failover that lost the registration: neither the key nor the owner's mark is there, and the
    # log says nothing about it.
    client = worker._client
    await client.pipeline(
        [
            ("HDEL", keys.structure("kv"), "i/1"),
            ("ZREM", keys.structure("idx"), "i/1"),
            ("ZREM", keys.structure("lk"), f"{lease}\0i/1"),
            ("HSET", keys.structure("lr"), lease, "1-1 0123456789abcdef"),
        ],
        transaction=True,
    )
    async with asyncio.timeout(30):
        while (record := await worker.get("i/1")) is None:
            await asyncio.sleep(0.02)
    assert record.lease == worker.lease_id
    assert worker.lease_losses == 0


# --------------------------------------------------------------------------- a hanging event loop


HANGING_WORKER = PROGRAMS / "hanging_worker.py"


@pytest.mark.parametrize(
    ("hang_s", "loop_stall_s", "where"), [(3.0, 60.0, "Python"), (5.0, 2.5, "C")], ids=["Python", "C"]
)
async def test_hung_worker_is_marked_then_gone_then_back(
    dynamo_redis_url: str,
    dynamo_redis_prefix: str,
    open_registry: Any,
    mirror: Any,
    hang_s: float,
    loop_stall_s: float,
    where: str,
) -> None:
    view = await mirror(await open_registry(dynamo_redis_url), "i/")
    arguments = [dynamo_redis_url, dynamo_redis_prefix, str(hang_s), str(loop_stall_s), where]
    process = subprocess.Popen(
        [sys.executable, HANGING_WORKER, *arguments], stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        await view.until_state({"i/1": b"ready", "i/2": b"plain"})
        await view.until_state({"i/1": b"not ready", "i/2": b"plain"}, 5.0)
        if hang_s > loop_stall_s:
            await view.until_state({}, 5.0)
            expired = [event for event in view.batches[-1].events if isinstance(event, Delete)]
            assert {event.cause for event in expired} == {DeleteCause.EXPIRED}
        await view.until_state({"i/1": b"ready", "i/2": b"plain"})
    finally:
        process.kill()
        process.wait()


# --------------------------------------------------------------------------- size


async def test_the_log_keeps_four_times_the_live_keys(
    dynamo_redis_url: str, dynamo_redis_prefix: str, open_registry: Any
) -> None:
    registry = await open_registry(dynamo_redis_url)
    for start in range(0, 3000, 500):
        await registry.transact([], [PutOp(f"k/{n}", b"") for n in range(start, start + 500)])
    for _ in range(28):
        await registry.transact([], [PutOp(f"k/{n}", b"") for n in range(500)])
    length = await registry._client.execute("XLEN", RegistryKeys(dynamo_redis_prefix).log)
    assert 12_000 <= length <= 12_200
