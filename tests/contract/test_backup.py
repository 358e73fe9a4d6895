"""A backup of one kind of server, restored to each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dynamo_redis.config import StoreSettings
from dynamo_redis.store.backup.archive import BackupReader, BackupWriter
from dynamo_redis.store.backup.restoring import Restoration, Restored
from dynamo_redis.store.backup.saving import Saved, save
from dynamo_redis.store.base import ObjectInfo, ObjectStore, Registry
from dynamo_redis.store.connect import open_store
from tests.contract.conftest import CLUSTER, SERVERS

CONTENTS = {
    ("models", "qwen/1/tokenizer.json"): bytes(range(256)) * 12_000,  # several chunks
    ("models", "empty"): b"",
    ("adapters", "fr/ü x"): b"adapter",
}
RECORDS = {"v1/busy_thresholds/demo": b'{"version":1}', "app/blob": bytes(range(256)), "app/empty": b""}


@asynccontextmanager
async def opened(url: str, prefix: str) -> AsyncIterator[tuple[Registry, ObjectStore]]:
    settings = StoreSettings.load(redis_url=url, prefix=prefix, command_timeout_s=15.0)
    registry, objects = open_store(settings)
    await registry.start()
    yield registry, objects
    await objects.aclose()
    await registry.aclose()


async def fill(registry: Registry, objects: ObjectStore) -> None:
    for (bucket, name), content in CONTENTS.items():
        await objects.put(bucket, name, content)
    await objects.put("kv_snapshots", "dynamo/backend/kv_events/0", b"index")
    for key, value in RECORDS.items():
        await registry.put(key, value)
    await registry.register("v1/instances/dynamo/backend/generate/1", b"secret")


async def save_all(path: Path, registry: Registry, objects: ObjectStore) -> Saved:
    with BackupWriter(path, prefix="x", created_at="2026-01-01", release="1") as writer:
        snapshot = await registry.get_prefix("")
        return await save(writer, snapshot, objects, without_buckets={"kv_snapshots"}, with_leased=True)


@pytest.mark.parametrize("source", ["path", CLUSTER])
@pytest.mark.parametrize("target", [*SERVERS, CLUSTER])
async def test_a_backup_is_restored_to_each_kind_of_server(
    source: str,
    target: str,
    server_urls: Callable[[str], str],
    dynamo_redis_prefix: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "backup.zip"
    async with opened(server_urls(source), dynamo_redis_prefix) as (registry, objects):
        await fill(registry, objects)
        saved = await save_all(path, registry, objects)
    assert (saved.records_count, saved.leased_count, saved.objects_count, saved.left_out) == (3, 1, 3, [])
    async with opened(server_urls(target), f"{dynamo_redis_prefix}copy") as (registry, objects):
        with BackupReader(path) as reader:
            reader.verify()
            for expected in (Restored(3, 3, 0, 0, 1), Restored(0, 0, 6, 0, 1)):  # and once more
                restoration = Restoration(reader, registry, objects, with_objects=True, on_conflict="fail")
                await restoration.check_conflicts()
                assert await restoration.run() == expected
        found = {record.key: record.value for record in (await registry.get_prefix("")).records}
        assert found == RECORDS
        assert {(info.bucket, info.name) for info in await objects.list()} == CONTENTS.keys()
        for (bucket, name), content in CONTENTS.items():
            assert await objects.read(bucket, name) == content


async def test_an_object_that_is_replaced_meanwhile_is_read_again(
    server_urls: Callable[[str], str],
    dynamo_redis_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "backup.zip"
    async with opened(server_urls("path"), dynamo_redis_prefix) as (registry, objects):
        await objects.put("b", "n", b"old")
        read_info = objects.info

        async def info_and_replace(bucket: str, name: str) -> ObjectInfo | None:
            found = await read_info(bucket, name)
            await objects.put("b", "n", b"new")
            return found

        monkeypatch.setattr(objects, "info", info_and_replace)
        saved = await save_all(path, registry, objects)
        assert (saved.objects_count, saved.left_out) == (1, [])
    with BackupReader(path) as reader:
        reader.verify()
        assert [b"".join(reader.pieces(stored)) for stored in reader.objects] == [b"new"]
