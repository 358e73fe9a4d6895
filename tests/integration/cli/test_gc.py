"""`dynamo-redis gc`, against a real server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import redis

from dynamo_redis.cli import connect, gc
from dynamo_redis.store.garbage.in_use import InUse
from dynamo_redis.store.keys import ObjectKeys
from tests.integration.conftest import Cli

pytestmark = pytest.mark.usefixtures("environment")

URL = "redis-object://models/{}/config.json"


@pytest.fixture
def old_files(cli: Cli, tmp_path: Path, dynamo_redis_url: str, dynamo_redis_prefix: str) -> list[str]:
    """Two model files that were put two days ago; the key `served` names one of them."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 5000)
    two_days_ago_ms = round((time.time() - 2 * 86_400) * 1000)
    found = []
    with redis.Redis.from_url(dynamo_redis_url) as server:
        for name in ("gone/config.json", "served/config.json"):
            assert cli("objects", "put", f"models/{name}", str(file)).code == 0
            key = ObjectKeys(dynamo_redis_prefix, "models", name).current
            server.hset(key, mapping={"created_at_ms": two_days_ago_ms, "put_at_ms": two_days_ago_ms})
            found.append(key)
    assert cli("put", "served", json.dumps({"files": [{"url": URL.format("served")}]})).code == 0
    return found


def test_it_shows_and_removes_only_when_it_is_told_to(
    cli: Cli, old_files: list[str], dynamo_redis_url: str
) -> None:
    shown = cli("gc")
    assert shown.code == 0
    assert "model files" in shown.out
    assert "models/gone/config.json" in shown.out
    assert "served" not in shown.out
    assert shown.err == "nothing was removed: --apply removes it\n"
    (files, *others) = cli("gc", "--json").json
    assert files == {
        "kind": "model files",
        "reason": "no model card names them",
        "count": 1,
        "size_bytes": 5000,
        "names": ["models/gone/config.json"],
        "removed_count": None,
    }
    assert [row["count"] for row in others] == [0] * len(others)
    with redis.Redis.from_url(dynamo_redis_url) as server:
        assert server.exists(*old_files) == 2
        removed = cli("gc", "--apply", "--settle", "0s", "--json").json
        assert [row.get("removed_count") for row in removed[:2]] == [1, 0]
        assert [server.exists(key) for key in old_files] == [0, 1]
    assert cli("gc").err == "nothing to remove\n"
    assert [row["name"] for row in cli("objects", "ls", "--json").json] == ["served/config.json"]


def test_what_one_of_both_readings_names_stays(
    cli: Cli, old_files: list[str], monkeypatch: pytest.MonkeyPatch, dynamo_redis_url: str
) -> None:
    """The lease of a process may have been lost just before one of them."""
    assert cli("put", "worker", json.dumps(URL.format("gone"))).code == 0
    read = gc._read_registry

    async def read_and_lose(options: dict[str, str | None]) -> InUse:
        found = await read(options)
        async with connect.open_registry(options, read_only=False) as registry:
            await registry.delete("worker")
        return found

    monkeypatch.setattr(gc, "_read_registry", read_and_lose)
    assert cli("gc", "--apply", "--settle", "0s", "--json").json[0]["count"] == 0
    assert cli("gc", "--apply", "--settle", "0s", "--json").json[0]["removed_count"] == 1
    with redis.Redis.from_url(dynamo_redis_url) as server:
        assert [server.exists(key) for key in old_files] == [0, 1]


def test_unknown_keys_are_listed(cli: Cli, dynamo_redis_url: str, dynamo_redis_prefix: str) -> None:
    with redis.Redis.from_url(dynamo_redis_url) as server:
        key = f"{{{dynamo_redis_prefix}/cache/x}}:y\x1b"
        server.set(key, b"x")
        shown = cli("gc", "--apply", "--settle", "0s")
        assert server.exists(key) == 1
    assert (shown.code, shown.err) == (0, "nothing to remove\n")
    assert shown.out.startswith("1 unknown keys, left alone:\n")
    assert "\x1b" not in shown.out


def test_a_grace_that_is_too_short_is_refused(cli: Cli) -> None:
    done = cli("gc", "--grace", "9m")
    assert done.code == 2
    assert "--grace: it is at least 10m" in done.err


def test_what_was_not_judged_is_said(cli: Cli, old_files: list[str], dynamo_redis_url: str) -> None:
    assert cli("put", "v1/mdc/dynamo/backend/generate/1", "no JSON").code == 0
    done = cli("gc", "--apply", "--settle", "0s")
    assert done.code == 1
    assert "v1/mdc/dynamo/backend/generate/1 is not JSON" in done.out
    with redis.Redis.from_url(dynamo_redis_url) as server:
        assert server.exists(*old_files) == 2
