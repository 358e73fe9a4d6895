"""`dynamo-redis backup` and `restore`, against a real server."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from dynamo_redis.store.keys import ObjectKeys
from tests.integration.conftest import Cli

pytestmark = pytest.mark.usefixtures("environment")

BIG = b"0123456789abcdef" * 150_000  # three chunks


@pytest.fixture
def backup(cli: Cli, tmp_path: Path) -> Path:
    """A backup of two objects, two keys and an empty value."""
    for name, content in (("models/m/config.json", b"{}"), ("adapters/big", BIG)):
        file = tmp_path / "content"
        file.write_bytes(content)
        assert cli("objects", "put", name, str(file)).code == 0
    assert cli("put", "app/motd", "hello").code == 0
    assert cli("put", "app/other", '{"n": 1}').code == 0
    path = tmp_path / "backup.zip"
    (saved,) = cli("backup", str(path), "--json").json
    assert (saved["records_count"], saved["objects_count"], saved["left_out"]) == (2, 2, [])
    return path


@pytest.fixture
def elsewhere(dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Another prefix, for commands that follow a call of `monkeypatch.setenv`."""
    return f"{dynamo_redis_prefix}copy"


def keys_of(url: str, prefix: str) -> list[bytes]:
    with redis.Redis.from_url(url) as server:
        return sorted(server.scan_iter(f"{{{prefix}*"))


def test_a_backup_is_private_and_can_be_read_by_common_tools(backup: Path, tmp_path: Path) -> None:
    assert backup.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob(".backup*")) == []
    with zipfile.ZipFile(backup) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("manifest.json"))
        assert (manifest["format"], manifest["version"]) == ("dynamo-redis backup", "1.0")
        assert [each["name"] for each in manifest["objects"]] == ["big", "m/config.json"]
        archive.extractall(tmp_path / "out")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "out", check=True)


def test_a_backup_replaces_an_older_one_only_when_it_is_complete(
    backup: Path, cli: Cli, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    with redis.Redis.from_url(dynamo_redis_url) as server:
        (chunk, *_) = server.scan_iter(f"{{{dynamo_redis_prefix}/object/adapters/big}}:chunk:*")
        server.setrange(chunk, 5, b"damage")
    done = cli("backup", str(backup))
    assert done.code == 1
    assert "chunk" in done.out
    assert "is damaged" in done.out
    with zipfile.ZipFile(backup) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert [each["name"] for each in manifest["objects"]] == ["m/config.json"]
    # What was saved can be restored.
    assert cli("restore", str(backup), "--redis-prefix", f"{dynamo_redis_prefix}copy").code == 0


def test_no_leased_leaves_out_records_of_processes(
    backup: Path, cli: Cli, dynamo_redis_url: str, dynamo_redis_prefix: str, tmp_path: Path
) -> None:
    import asyncio

    from dynamo_redis.config import StoreSettings
    from dynamo_redis.store.connect import open_store

    async def hold_and_back_up() -> list[list[dict[str, object]]]:
        registry, objects = open_store(
            StoreSettings.load(redis_url=dynamo_redis_url, prefix=dynamo_redis_prefix)
        )
        await registry.start()
        await registry.register("v1/instances/d/b/g/1", b'{"secret": "s"}')
        done = []
        for option in ("--leased", "--no-leased"):
            await asyncio.to_thread(cli, "backup", str(backup), option, "--no-objects")
            with zipfile.ZipFile(backup) as archive:
                done.append([json.loads(line) for line in archive.read("records.jsonl").splitlines()])
        await registry.aclose()
        await objects.aclose()
        return done

    leased, lasting = asyncio.run(hold_and_back_up())
    assert [record["key"] for record in leased if record["lease"]] == ["v1/instances/d/b/g/1"]
    assert [record["key"] for record in lasting] == ["app/motd", "app/other"]


def test_restore_by_each_rule(backup: Path, cli: Cli, elsewhere: str, tmp_path: Path) -> None:
    there = ("--redis-prefix", elsewhere)
    (tmp_path / "other").write_bytes(b"other")
    assert cli("put", "app/motd", "mine", *there).code == 0
    assert cli("objects", "put", "adapters/big", str(tmp_path / "other"), *there).code == 0
    refused = cli("restore", str(backup), *there)
    assert refused.code == 1
    assert refused.err == (
        "dynamo-redis: exists with other content: key app/motd, object adapters/big: "
        "--on-conflict keep leaves them as they are, replace restores them\n"
    )
    assert cli("get", "app/other", *there).code == 1
    assert [row["name"] for row in cli("objects", "ls", "--json", *there).json] == ["big"]
    (kept,) = cli("restore", str(backup), "--on-conflict", "keep", "--json", *there).json
    assert (kept["records_count"], kept["objects_count"], kept["kept_count"]) == (1, 1, 2)
    assert cli("get", "app/motd", "--raw", *there).out == "mine"
    assert cli("restore", str(backup), "--on-conflict", "replace", *there).code == 0
    assert cli("get", "app/motd", "--raw", *there).out == "hello"
    (again,) = cli("restore", str(backup), "--json", *there).json
    assert (again["same_count"], again["records_count"], again["objects_count"]) == (4, 0, 0)


def test_restore_without_objects(backup: Path, cli: Cli, elsewhere: str) -> None:
    there = ("--redis-prefix", elsewhere)
    assert cli("restore", str(backup), "--no-objects", *there).code == 0
    assert cli("get", "app/motd", "--raw", *there).out == "hello"
    assert cli("objects", "ls", "--json", *there).json == []


# --------------------------------------------------------------------------- damaged files


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, parts: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> None:
    """Write members with sums that fit, as a hostile author would."""
    parts["SHA256SUMS"] = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in parts.items()
        if name != "SHA256SUMS"
    ).encode()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def with_manifest(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        parts = members(path)
        manifest = json.loads(parts["manifest.json"]) | changes
        rewrite(path, parts | {"manifest.json": json.dumps(manifest).encode()})

    return change


def with_record(line: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        parts = members(path)
        rewrite(path, parts | {"records.jsonl": parts["records.jsonl"] + line})

    return change


def without(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        parts = members(path)
        del parts[name]
        rewrite(path, parts)

    return change


def flipped(text: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[content.index(text)] ^= 1
        path.write_bytes(content)

    return change


def truncated(share: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return change


def moved_directory(path: Path) -> None:
    """The archive's directory says that it begins elsewhere."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x05\x06")
    content[at + 16 : at + 20] = b"\xf0\xff\xff\xff"
    path.write_bytes(content)


def exchanged(path: Path) -> None:
    """Other content of the same size, with the archive's own check sum of it, and the old SHA-256."""
    parts = members(path)
    parts["objects/0"] = bytes(len(parts["objects/0"]))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


OBJECT = {"bucket": "b", "name": "n", "size_bytes": 2, "sha256": "0" * 64, "member": "records.jsonl"}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000)),
    "cut early": truncated(0.2),
    "cut late": truncated(0.999),
    "content changed": flipped(b"0123456789abcdef0123"),
    "record changed": flipped(b'"key": "app/motd"'),
    "manifest changed": flipped(b'"format"'),
    "content exchanged": exchanged,
    "directory moved": moved_directory,
    "compressed": lambda path: rewrite(path, members(path), compression=zipfile.ZIP_DEFLATED),
    "no records": without("records.jsonl"),
    "no content": without("objects/0"),
    "another format": with_manifest(format="tar"),
    "no objects": with_manifest(objects=None),
    "an object that is none": with_manifest(objects=[7]),
    "an object with another sum": with_manifest(objects=[OBJECT]),
    "nested": lambda path: rewrite(path, members(path) | {"manifest.json": b"[" * 100_000}),
    "a key with NUL": with_record(b'{"key": "a\\u0000b", "value": ""}\n'),
    "a key twice": with_record(b'{"key": "app/motd", "value": ""}\n'),
    "a value that is no base64": with_record(b'{"key": "k", "value": "*"}\n'),
    "a value that is too large": with_record(b'{"key": "k", "value": "' + b"AAAA" * 400_000 + b'"}\n'),
    "a line that does not end": with_record(b'{"key": "' + b"x" * 3_000_000),
    "no record": with_record(b"7\n"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_and_nothing_is_written(
    damage: str, backup: Path, cli: Cli, elsewhere: str, dynamo_redis_url: str
) -> None:
    DAMAGE[damage](backup)
    done = cli("restore", str(backup), "--redis-prefix", elsewhere)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"dynamo-redis: {backup} is not a whole backup of dynamo-redis: ")
    assert done.err.count("\n") == 1
    assert len(done.err) < 600
    assert keys_of(dynamo_redis_url, elsewhere) == []


def test_another_major_version_is_refused_by_name(
    backup: Path, cli: Cli, elsewhere: str, dynamo_redis_url: str
) -> None:
    with_manifest(version="2.0")(backup)
    done = cli("restore", str(backup), "--redis-prefix", elsewhere)
    assert done.code == 1
    assert "the backup" in done.err
    assert "has schema version 2.0, this release reads 1" in done.err
    assert "restore it with the release that wrote it" in done.err
    assert keys_of(dynamo_redis_url, elsewhere) == []


def test_a_later_minor_version_is_restored(backup: Path, cli: Cli, elsewhere: str) -> None:
    with_manifest(version="1.7", more={"x": [1]})(backup)
    with_record(b'{"key": "later", "value": "eA==", "ttl": 5}\n')(backup)
    rewrite(backup, members(backup) | {"notes.txt": b"later"})
    assert cli("restore", str(backup), "--redis-prefix", elsewhere).code == 0
    assert cli("get", "later", "--raw", "--redis-prefix", elsewhere).out == "x"


def test_a_file_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    missing = cli("restore", str(tmp_path / "none.zip"))
    assert (missing.code, missing.err) == (
        1,
        f"dynamo-redis: {tmp_path}/none.zip: No such file or directory\n",
    )
    nowhere = cli("backup", str(tmp_path / "none" / "b.zip"))
    assert nowhere.code == 1
    assert "there is no such directory" in nowhere.err


# --------------------------------------------------------------------------- interruptions


def test_a_restore_that_was_killed_is_done_again(
    cli: Cli, tmp_path: Path, elsewhere: str, dynamo_redis_url: str
) -> None:
    contents = {f"o{number:03}": hashlib.shake_128(b"%d" % number).digest(200_000) for number in range(100)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert cli("objects", "put", f"b/{name}", str(tmp_path / name)).code == 0
    assert cli("put", "app/motd", "hello").code == 0
    path = tmp_path / "backup.zip"
    assert cli("backup", str(path)).code == 0
    command = [sys.executable, "-m", "dynamo_redis", "restore", str(path), "--redis-prefix", elsewhere]
    with redis.Redis.from_url(dynamo_redis_url) as server:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while server.zcard(f"{{{elsewhere}/object}}:names") < 3:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        written = [name for name in contents if server.exists(ObjectKeys(elsewhere, "b", name).current)]
        assert 2 <= len(written) < len(contents)
    (done,) = cli("restore", str(path), "--json", "--redis-prefix", elsewhere).json
    assert (done["objects_count"], done["same_count"]) == (len(contents) - len(written), len(written))
    assert cli("get", "app/motd", "--raw", "--redis-prefix", elsewhere).out == "hello"
    for name, content in contents.items():
        got = tmp_path / "got"
        assert cli("objects", "get", f"b/{name}", str(got), "--redis-prefix", elsewhere).code == 0
        assert got.read_bytes() == content
