"""Every decoder of stored or sent values returns a value or raises InvalidRecord, for any input."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_redis.errors import InvalidRecord, SchemaMismatch, StoreError
from dynamo_redis.events.router_record import RouterRecord
from dynamo_redis.frontend.model import CardEntry
from dynamo_redis.models.card import ModelCard
from dynamo_redis.names import EndpointName, InstanceId, kv_router_key
from dynamo_redis.router.index.ledger import Ledger
from dynamo_redis.router.index.prefix_index import KvIndex
from dynamo_redis.router.index.snapshot import decode_snapshot, snapshot_positions
from dynamo_redis.router.router_state import check_state
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Record, Revision
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.kv_event import read_kv_events
from tests.rubbish import (
    WORST_JSON,
    WORST_MSGPACK,
    WORST_VALUES,
    arrays_like,
    msgpack_values,
    records_like,
    with_field,
)

unhurried = settings(deadline=None)
ENDPOINT = EndpointName("dynamo", "backend", "generate")
ID = InstanceId(5)
REVISION = Revision("1-0")

INSTANCE: dict[str, Any] = json.loads(
    Instance(ENDPOINT, ID, {"tcp": f"h:1/{ENDPOINT.subject(ID)}"}, True, b"\x01", 12.5).to_bytes()
)
CARD: dict[str, Any] = json.loads(
    ModelCard(display_name="demo", slug="demo", context_length=100, kv_cache_block_size=16).to_bytes()
)
ROUTER: dict[str, Any] = json.loads(
    RouterRecord(namespace="dynamo", component="backend", router_id="5-a", instance_id=5).to_bytes()
)
BATCH: list[Any] = [1, "kv_events", 5, 6, 0, 7, 1_700_000_000_000, [[0, 0, b"\0" * 8]]]
STATE: dict[str, Any] = {
    "router_id": "5-a",
    "endpoint": "dynamo.backend.generate",
    "mode": "events",
    "workers": [],
    "active_count": 0,
    "waiting_count": 0,
    "hit_rate": None,
    "index": {
        "block_count": 0,
        "mode": "stream",
        "caught_up": True,
        "connected": True,
        "disconnected_s": 0.0,
        "lag_count": 1,
        "lag_s": 0.5,
        "snapshot": {"at": 1.0},
    },
}


def record(key: str, value: bytes) -> Record:
    return Record(key, value, REVISION, REVISION, 1, None)


JSON_DECODERS: dict[str, tuple[Callable[[bytes], Any], dict[str, Any]]] = {
    "instance": (lambda stored: Instance.from_record(record(ENDPOINT.instance_key(ID), stored)), INSTANCE),
    "card": (lambda stored: CardEntry.from_record(record(ENDPOINT.model_card_key(ID), stored), 0), CARD),
    "router": (
        lambda stored: RouterRecord.from_record(record(kv_router_key("dynamo", "backend", "5-a"), stored)),
        ROUTER,
    ),
}
json_decoders = pytest.mark.parametrize("decoder", JSON_DECODERS)


@json_decoders
def test_good_record_is_read(decoder: str) -> None:
    decode, good = JSON_DECODERS[decoder]
    decode(json.dumps({**good, "field of a later minor": {"a": [1]}}).encode())


@json_decoders
@pytest.mark.parametrize("name", WORST_JSON)
def test_worst_record_is_invalid(decoder: str, name: str) -> None:
    with pytest.raises(InvalidRecord, match=r"v1/.* (is not|has schema version)") as raised:
        JSON_DECODERS[decoder][0](WORST_JSON[name])
    assert "`dynamo-redis del v1/" in str(raised.value) or isinstance(raised.value, SchemaMismatch)
    assert len(str(raised.value)) < 500


@json_decoders
@pytest.mark.parametrize("name", WORST_VALUES)
def test_worst_field_is_invalid_or_harmless(decoder: str, name: str) -> None:
    decode, good = JSON_DECODERS[decoder]
    for field in (*good, "another"):
        with suppress(InvalidRecord):
            decode(with_field(good, field, WORST_VALUES[name]))


@json_decoders
@unhurried
@given(data=st.data())
def test_any_record_is_read_or_invalid(decoder: str, data: st.DataObject) -> None:
    decode, good = JSON_DECODERS[decoder]
    stored = data.draw(records_like(good) | st.binary(max_size=50))
    with suppress(InvalidRecord):
        decode(stored)


@json_decoders
def test_unknown_major_is_refused_though_fields_differ(decoder: str) -> None:
    with pytest.raises(SchemaMismatch, match=r"has schema version 2, this release reads 1: upgrade"):
        JSON_DECODERS[decoder][0](b'{"version": 2, "all": "else differs"}')


@pytest.mark.parametrize(
    "changes",
    [
        {"instance_id": 6},
        {"namespace": "other"},
        {"component": "c"},
        {"endpoint": "e"},
        {"instance_id": True},
    ],
)
def test_record_that_contradicts_its_key_is_invalid(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRecord, match="is not an instance record"):
        JSON_DECODERS["instance"][0](json.dumps({**INSTANCE, **changes}).encode())


@pytest.mark.parametrize(
    "key",
    [
        "a/b/c",
        "a/b/c/zz",
        "a/b/c/-5",
        f"a/b/c/{'f' * 40}",
        "/b/c/5",
        "%zz/b/c/5",
        "a b/b/c/5",
        "a/b/c/05",
        "a/b/c/0x5",
    ],
)
def test_card_below_another_key_is_invalid(key: str) -> None:
    with pytest.raises(InvalidRecord, match="is not a model card"):
        CardEntry.from_record(record(f"v1/mdc/{key}", json.dumps(CARD).encode()), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_cache_block_size": 0},
        {"kv_cache_block_size": -3},
        {"kv_cache_block_size": 1 << 70},
        {"kv_cache_block_size": True},
        {"context_length": 0},
        {"display_name": ""},
        {"runtime_config": {"data_parallel_size": 10**9}},
        {"files": {"tokenizer.json": {"url": "x", "sha256": "0" * 64, "size_bytes": -1}}},
    ],
)
def test_card_without_a_usable_size_is_invalid(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRecord):
        ModelCard.from_bytes(json.dumps({**CARD, **changes}).encode())


def test_message_does_not_show_a_secret() -> None:
    for secret in ("deadbeef is not hexadecimal", ["deadbeef"], {"deadbeef": 1}):
        with pytest.raises(InvalidRecord) as raised:
            JSON_DECODERS["instance"][0](json.dumps({**INSTANCE, "secret": secret}).encode())
        assert "deadbeef" not in str(raised.value)


# --------------------------------------------------------------------------- msgpack


@pytest.mark.parametrize("name", WORST_MSGPACK)
@pytest.mark.parametrize("decode", [EventBatch.from_bytes, decode_snapshot, snapshot_positions])
def test_worst_msgpack_is_invalid(decode: Callable[[bytes], Any], name: str) -> None:
    with pytest.raises(InvalidRecord):
        decode(WORST_MSGPACK[name])


@unhurried
@given(arrays_like(BATCH))
def test_any_batch_is_read_or_invalid(fields: list[Any]) -> None:
    with suppress(InvalidRecord):
        read_kv_events(EventBatch.from_bytes(msgpack.packb(fields)).events)


def test_schema_mismatch_names_the_value() -> None:
    with pytest.raises(
        SchemaMismatch, match=r"^a batch of events has schema version 2, this release reads 1"
    ):
        EventBatch.from_bytes(msgpack.packb([2, *BATCH[1:]]))


# --------------------------------------------------------------------------- answers


@unhurried
@given(
    st.dictionaries(
        st.sampled_from(["epoch", "dp_rank", "next_sequence", "kind", "batch", "x"]), msgpack_values()
    )
)
def test_any_item_of_an_answer_is_taken_or_invalid(item: dict[str, Any]) -> None:
    reader = Ledger(KvIndex(max_blocks=100, prune_target_ratio=0.8)).begin_ask(1)
    try:
        reader.apply(item)
        reader.finish()
    except InvalidRecord:
        reader.fail()


@pytest.mark.parametrize("field", ["epoch", "dp_rank", "next_sequence"])
@pytest.mark.parametrize("value", [None, True, -1, 1.0, "1", 1 << 63])
def test_rank_of_an_answer_has_numbers(field: str, value: Any) -> None:
    reader = Ledger(KvIndex(max_blocks=100, prune_target_ratio=0.8)).begin_ask(1)
    head = {"epoch": 1, "dp_rank": 0, "next_sequence": 3, "kind": "dump"}
    with pytest.raises(InvalidRecord, match=field):
        reader.apply({**head, field: value})


def test_good_state_of_a_router_is_taken() -> None:
    assert check_state(STATE) is STATE
    predicted = {**STATE, "mode": "predicted", "index": {"block_count": 3}}
    assert check_state(predicted) is predicted


@pytest.mark.parametrize("field", STATE)
def test_state_without_a_field_is_invalid(field: str) -> None:
    if field == "hit_rate":  # may be unknown
        return
    with pytest.raises(InvalidRecord, match=rf"its {field} is None|NoneType"):
        check_state({**STATE, field: None})


@unhurried
@given(st.data())
def test_any_state_is_taken_or_invalid(data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(STATE)), msgpack_values(), max_size=2))
    inner = data.draw(st.dictionaries(st.sampled_from(sorted(STATE["index"])), msgpack_values(), max_size=2))
    with suppress(InvalidRecord):
        check_state({**STATE, "index": {**STATE["index"], **inner}, **changes})


# --------------------------------------------------------------------------- the error itself


def test_invalid_record_is_an_error_of_the_store() -> None:
    error = InvalidRecord("a model card", "no\nreason" + "x" * 5000, key="v1/mdc/a", remedy="remove it")
    assert isinstance(error, StoreError)
    assert str(error).startswith(r"v1/mdc/a is not a model card: no\x0areason")
    assert str(error).endswith("… (remove it)")
    assert len(str(error)) < 300
    assert str(InvalidRecord("a batch", 10**5000)) == "not a batch: a int that cannot be printed"
