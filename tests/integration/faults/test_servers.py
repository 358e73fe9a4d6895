"""The fault harness: its actions on servers, and that its observer misses no entry of theirs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.base import PutOp
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.registry.redis_registry import RedisRegistry
from dynamo_redis.store.server import find_server
from faults.history import History, Note, Recorder
from faults.observer import Observer
from faults.servers import ServerKind, ServerUnderTest, faketime_library, final_state, installed_servers

PREFIX = "observed"
KIND = ServerKind("any", find_server())

StartServer = Callable[..., Awaitable[ServerUnderTest]]


@pytest.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    servers: list[ServerUnderTest] = []

    async def start(label: str, *, clock: bool = False) -> ServerUnderTest:
        server = ServerUnderTest(label, KIND, tmp_path / label, clock=clock)
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.aclose()


@pytest.fixture
async def observer(tmp_path: Path) -> AsyncIterator[Observer]:
    recorder = Recorder(tmp_path, "observer")
    made = Observer(recorder, PREFIX)
    yield made
    await made.aclose()
    recorder.close()


def _log(directory: Path) -> list[Note]:
    return list(History.read(directory).of("log"))


async def _write(server: ServerUnderTest, *keys: str) -> None:
    registry = RedisRegistry(StoreSettings.load(redis_url=server.url, prefix=PREFIX))
    await registry.start()
    await registry.transact([], [PutOp(key, b"v") for key in keys])
    await registry.aclose()


async def test_destroyed_entries_were_observed_before(
    start_server: StartServer, observer: Observer, tmp_path: Path
) -> None:
    server = await start_server("a")
    observer.follow(server)
    await _write(server, "1", "2")
    await observer.read_and_run(server, ("XTRIM", RegistryKeys(PREFIX).log, "MAXLEN", 0))
    await _write(server, "3")
    await observer.read_and_run(server, ("FLUSHALL",))
    await _write(server, "4")
    await observer.catch_up(server)
    seen = _log(tmp_path)
    assert [note.fields["key"] for note in seen] == ["", "1", "2", "3", "", "4"]
    assert len({note.fields["incarnation"] for note in seen}) == 2
    for before, after in itertools.pairwise(seen):
        if after.fields["kind"] != "i":
            assert after.fields["previous"] == [before.fields["id"], before.fields["operation"]]
    state = await final_state(server, PREFIX)
    assert state["revision"] == seen[-1].fields["id"]
    assert state["records"] == {"4": ["v", None, seen[-1].fields["id"]]}


async def test_notes_branch_after_a_lost_tail(
    start_server: StartServer, observer: Observer, tmp_path: Path
) -> None:
    server = await start_server("a")
    observer.follow(server)
    await _write(server, "kept")
    synced_bytes = server.log_file_bytes()
    await _write(server, "lost")
    await server.pause_writes()
    await observer.catch_up(server)
    await server.kill()
    server.truncate_log_file(synced_bytes)
    await server.start()
    await _write(server, "new")
    await observer.catch_up(server)
    kept, lost, new = [note for note in _log(tmp_path) if note.fields["key"]]
    branch = [kept.fields["id"], kept.fields["operation"]]
    assert lost.fields["previous"] == new.fields["previous"] == branch


async def test_promoted_replica_lacks_the_last_writes(start_server: StartServer, tmp_path: Path) -> None:
    old, new = await start_server("a"), await start_server("b")
    await _write(old, "kept")
    await new.replicate(old)
    await new.promote()
    await _write(old, "lost")
    assert (await final_state(old, PREFIX))["records"].keys() == {"kept", "lost"}
    assert (await final_state(new, PREFIX))["records"].keys() == {"kept"}


async def test_clients_and_harness_reconnect_after_client_kill(start_server: StartServer) -> None:
    server = await start_server("a")
    registry = RedisRegistry(StoreSettings.load(redis_url=server.url, prefix=PREFIX))
    await registry.start()
    ids = await server.client_ids()
    assert ids
    await server.kill_clients()
    assert not set(ids) & set(await server.client_ids())
    await registry.put("k", b"v")
    await registry.aclose()


@pytest.mark.skipif(faketime_library() is None, reason="needs libfaketime")
async def test_clock_is_shifted_while_the_server_runs(start_server: StartServer) -> None:
    server = await start_server("a", clock=True)
    assert abs(await server.clock_offset_s()) < 5
    for offset_s in (3600.0, -3600.0, 0.0):
        server.set_clock(offset_s)
        assert abs(await server.clock_offset_s() - offset_s) < 5


async def test_frozen_server_answers_again_when_thawed(start_server: StartServer) -> None:
    server = await start_server("a")
    server.freeze()
    asking = asyncio.create_task(server.execute("PING"))
    await asyncio.sleep(0.1)
    assert not asking.done()
    server.thaw()
    assert await asking == b"PONG"


def test_servers_are_named_by_program_and_version() -> None:
    kinds = installed_servers()
    assert kinds
    assert len({kind.name for kind in kinds}) == len(kinds)
    for kind in kinds:
        product, _, version = kind.name.partition("-")
        assert product in ("redis", "valkey")
        assert len(version.split(".")) == 2
