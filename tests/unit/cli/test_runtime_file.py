from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_redis import config
from dynamo_redis.config import (
    RuntimeSettings,
    StoreSettings,
    child_environment,
    origins,
    read_runtime_file,
    remove_runtime_file,
    write_runtime_file,
)
from dynamo_redis.errors import ConfigError


@pytest.fixture(autouse=True)
def own_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("DYN_REDIS_URL", "DYN_REDIS_PREFIX", "DYN_LEASE_TTL_S", "DYN_LOG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def another_process() -> Iterator[int]:
    """Yield the id of another live process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid


def leave_file(pid: int, **addresses: str) -> Path:
    path = config.runtime_directory() / f"up.{pid}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"pid": pid, **addresses}))
    return path


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_without_a_server_the_error_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"DYN_REDIS_URL.*dynamo-redis up"):
        StoreSettings.load().require_url()


def test_a_running_up_is_found_with_its_prefix() -> None:
    write_runtime_file(redis_url="redis://:pw@localhost:1", prefix="mine")
    settings = StoreSettings.load()
    assert (settings.require_url(), settings.prefix) == ("redis://:pw@localhost:1", "mine")
    assert "pw" not in repr(settings)


def test_settings_have_precedence_over_running_up(monkeypatch: pytest.MonkeyPatch) -> None:
    write_runtime_file(redis_url="redis://localhost:1", prefix="mine")
    assert StoreSettings.load(prefix="other").prefix == "other"
    monkeypatch.setenv("DYN_REDIS_URL", "redis://localhost:2")
    settings = StoreSettings.load()
    assert (settings.require_url(), settings.prefix) == ("redis://localhost:2", "dynamo")


def test_only_this_user_can_read_the_file() -> None:
    write_runtime_file(redis_url="redis://:pw@localhost:1")
    (path,) = config.runtime_directory().glob("up.*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_ups_do_not_disturb_each_other(another_process: int) -> None:
    write_runtime_file(redis_url="redis://first")
    later = leave_file(another_process, redis_url="redis://second")
    os.utime(later, (time.time() + 10,) * 2)
    assert read_runtime_file()["redis_url"] == "redis://second", "the last one started"
    remove_runtime_file()
    assert read_runtime_file()["redis_url"] == "redis://second"
    later.unlink()
    write_runtime_file(redis_url="redis://first")
    assert read_runtime_file()["redis_url"] == "redis://first"


def test_files_of_dead_processes_are_ignored_and_removed() -> None:
    stale = leave_file(dead_pid(), redis_url="redis://gone")
    leave_file(os.getpid()).write_text("{broken")
    assert read_runtime_file() == {}
    write_runtime_file(redis_url="redis://here")
    assert not stale.exists()
    assert read_runtime_file()["redis_url"] == "redis://here"


def test_a_file_of_another_user_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    write_runtime_file(redis_url="redis://theirs")
    monkeypatch.setattr(os, "getuid", lambda: config.runtime_directory().stat().st_uid + 1)
    assert read_runtime_file() == {}


def test_origins_tell_where_each_value_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("DYN_LEASE_TTL_S=11\nDYN_REDIS_PREFIX=a\n")
    monkeypatch.setenv("dyn_redis_prefix", "b")
    found = origins(StoreSettings, {"redis_url"})
    assert found["redis_url"] == "command line"
    assert found["prefix"] == "environment"
    assert found["lease_ttl_s"] == ".env"
    assert found["loop_stall_s"] == "default"
    assert origins(RuntimeSettings)["log"] == "default"


def test_a_childs_environment_has_each_setting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("dyn_redis_prefix", "old")
    env = child_environment({"DYN_REDIS_PREFIX": "new"})
    assert [value for name, value in env.items() if name.upper() == "DYN_REDIS_PREFIX"] == ["new"]
    assert env["PATH"] == os.environ["PATH"]
