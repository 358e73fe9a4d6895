"""The slots of a cluster: the keys that one script may touch share one, and those of different things are
spread."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from redis.crc import key_slot

from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.event_base import StreamName
from dynamo_redis.store.keys import LockKeys, ObjectKeys, RegistryKeys, StreamKeys, inbox_key, stream_of_key

PREFIXES = ("dynamo", "a/b", "50%", "ключ")
NAMES = ("model", "Qwen/Qwen3-0.6B", "{brace}", "}{", "50%", "a:b", "模型")


def slots(keys: Iterable[str]) -> set[int]:
    return {key_slot(key.encode()) for key in keys}


def stream_keys(keys: StreamKeys) -> list[str]:
    return [*keys.all, keys.messages]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_registry_keys_share_a_slot(prefix: str) -> None:
    keys = RegistryKeys(prefix)
    assert len(slots([*keys.structures, keys.lease(LeaseId(1)), keys.lease(LeaseId(2**63 - 1))])) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_objects_keys_and_lock_share_a_slot(prefix: str, name: str) -> None:
    keys = ObjectKeys(prefix, name, name)
    lock = LockKeys.of_object(prefix, name, name)
    assert len(slots([
        *(keys.current, keys.damaged, keys.chunk("1:ab"), keys.done("v"), keys.claim("1:ab")),
        *(lock.lock, lock.fence, *lock.protected),
    ])) == 1  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_locks_keys_share_a_slot(prefix: str, name: str) -> None:
    keys = LockKeys.of_name(prefix, name)
    assert len(slots([keys.lock, keys.fence, *keys.protected])) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_streams_keys_and_channel_share_a_slot(prefix: str, name: str) -> None:
    assert len(slots(stream_keys(StreamKeys(prefix, StreamName(name, name, name))))) == 1


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("shards_count", [2, 3, 6, 16])
def test_shards_divide_the_slots_as_masters_do(prefix: str, shards_count: int) -> None:
    shards = StreamName("dynamo", "backend", "kv_events", shards_count=shards_count).shards()
    for index, shard in enumerate(shards):
        keys = StreamKeys(prefix, shard)
        [slot] = slots(stream_keys(keys))
        assert slot * shards_count // 16_384 == index
        assert stream_of_key(prefix, keys.events.encode()) == shard


def test_a_stream_without_shards_keeps_its_key() -> None:
    keys = StreamKeys("dynamo", StreamName("dynamo", "backend", "kv_events"))
    assert keys.events == "{dynamo/dynamo/backend/kv_events/0}:events"


def test_different_things_are_spread_over_slots() -> None:
    """Of 500 names, no two kinds and hardly two names share a slot of 16,384."""
    count = 100
    names = [f"name{number}" for number in range(count)]
    keys = [
        *(ObjectKeys("dynamo", "bucket", name).current for name in names),
        *(LockKeys.of_name("dynamo", name).lock for name in names),
        *(StreamKeys("dynamo", StreamName("dynamo", name, "kv_events")).events for name in names),
        *(inbox_key("dynamo", "requests", f"default.{name}") for name in names),
        *(RegistryKeys(name).log for name in names),
    ]
    assert len(slots(keys)) > 0.95 * len(keys)
