"""Log entries and records as values."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings

from dynamo_redis.errors import InvalidRecord
from dynamo_redis.store.base import Delete, DeleteCause, LeaseId, Put, Record, Revision
from dynamo_redis.store.redis.key_types import describe_wrong_types
from dynamo_redis.store.registry.change_log import order, parse_change, parse_record, parse_records
from dynamo_redis.store.registry.scripts_api import HistoryLost, check_chain, parse_changes, replay
from tests.rubbish import WORST_MSGPACK, arrays_like

unhurried = settings(deadline=None)

Fields = dict[str, str]


def entry(
    revision: str, previous: str = "1-0", kind: str = "p", key: str = "k", **more: str
) -> tuple[bytes, list[bytes]]:
    fields = {"o": kind, "k": key, "v": "v", "l": "", "c": "", "n": "1", "w": "op" + revision}
    fields |= {"p": previous, "q": "op" + previous} | more
    return revision.encode(), [part.encode() for pair in fields.items() for part in pair]


def test_put_without_create_revision_names_its_own() -> None:
    created = parse_change(*entry("5-1", l="ff"))
    assert created.event == Put(Record("k", b"v", Revision("5-1"), Revision("5-1"), 1, LeaseId(255)))
    changed = parse_change(*entry("5-2", c="5-1", n="2"))
    assert changed.record == Record("k", b"v", Revision("5-1"), Revision("5-2"), 2, None)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("d", DeleteCause.DELETED), ("r", DeleteCause.REVOKED), ("x", DeleteCause.EXPIRED)],
)
def test_delete_names_its_cause(kind: str, cause: DeleteCause) -> None:
    assert parse_change(*entry("5-1", kind=kind)).event == Delete("k", Revision("5-1"), cause)


def test_an_entry_of_no_known_kind_changes_nothing() -> None:
    assert parse_change(*entry("5-1", kind="z")).event is None
    assert parse_change(*entry("5-1", kind="i")).incarnation == "v"


def test_unknown_fields_are_ignored_and_missing_ones_are_not() -> None:
    assert parse_change(*entry("5-1", z="later")).key == "k"
    entry_id, fields = entry("5-1")
    with pytest.raises(InvalidRecord, match="5-1 is not an entry of the change log"):
        parse_change(entry_id, fields[:-2])


@pytest.mark.parametrize(
    "fields",
    [
        [b"foreign", b"entry"],
        [],
        [b"o"],
        [b"o", b"p"] * 9,
        entry("5-1", l="no lease")[1],
        entry("5-1", n="no number")[1],
        [b"\xff" if part == b"k" else part for part in entry("5-1")[1]],
        [b"\xff" if part == b"op1-0" else part for part in entry("5-1")[1]],
    ],
)
def test_foreign_entry_is_left_out_and_named(fields: list[bytes]) -> None:
    invalid: list[InvalidRecord] = []
    changes = parse_changes([[b"5-1", fields], entry("5-2")], invalid.append)
    assert [change.revision for change in changes] == ["5-2"]
    assert [exc.key for exc in invalid] == ["5-1"]


def test_revisions_sort_by_number() -> None:
    ids = ["9-10", "9-9", "10-0", "9-0"]
    assert sorted(ids, key=lambda revision: order(Revision(revision))) == ["9-0", "9-9", "9-10", "10-0"]


def test_a_chain_connects_by_id_and_operation() -> None:
    first, second = parse_change(*entry("2-0", "1-0")), parse_change(*entry("3-0", "2-0"))
    check_chain(Revision("1-0"), "op1-0", [first, second])
    check_chain(Revision("1-0"), None, [first, second])
    check_chain(Revision("1-0"), "op1-0", [])
    for after, operation, changes in (
        ("1-0", "other", [first]),
        ("0-0", "op0-0", [first]),
        ("1-0", "op1-0", [second]),
        ("1-0", "op1-0", [first, parse_change(*entry("3-0", "2-0", q="other"))]),
    ):
        with pytest.raises(HistoryLost):
            check_chain(Revision(after), operation, changes)


def test_replay_applies_only_changes_newer_than_each_record() -> None:
    old, new = (
        Record(key, b"page", Revision(r), Revision(r), 1, None) for key, r in (("a", "2-0"), ("b", "9-0"))
    )
    records = {"a": old, "b": new}
    changes = [
        parse_change(*entry("3-0", key="a", v="newer")),
        parse_change(*entry("4-0", key="b", v="older than the page that held it")),
        parse_change(*entry("5-0", key="b", kind="d")),
        parse_change(*entry("6-0", key="c")),
        parse_change(*entry("7-0", key="c", kind="x")),
        parse_change(*entry("8-0", key="other/1")),
    ]
    replay(records, "", changes[:5])
    assert {key: record.value for key, record in records.items()} == {"a": b"newer", "b": b"page"}
    replay(records, "a", changes[5:])
    assert "other/1" not in records


def test_a_record_is_unpacked() -> None:
    packed = msgpack.packb(["5-2", "5-1", 2, "ff", b"\x00\xff"], use_bin_type=False)
    assert parse_record("k", packed) == Record(
        "k", b"\x00\xff", Revision("5-1"), Revision("5-2"), 2, LeaseId(255)
    )
    assert parse_record("k", b"") is None


def test_fields_of_a_later_minor_are_ignored() -> None:
    later = msgpack.packb(["5-2", "5-1", 2, "ff", b"v", ["a later field"]], use_bin_type=False)
    records: dict[str, Record] = {}
    invalid: dict[str, InvalidRecord] = {}
    parse_records([b"k", later], records, invalid)
    assert records == {"k": parse_record("k", later)}
    assert not invalid


@pytest.mark.parametrize("name", [name for name in WORST_MSGPACK if WORST_MSGPACK[name]])
def test_damaged_record_is_invalid_and_alone(name: str) -> None:
    with pytest.raises(InvalidRecord, match=r"^k is not a record of the registry: .*dynamo-redis del k"):
        parse_record("k", WORST_MSGPACK[name])
    good = msgpack.packb(["5-2", "5-1", 2, "ff", b"v"], use_bin_type=False)
    records: dict[str, Record] = {}
    invalid: dict[str, InvalidRecord] = {}
    parse_records([b"a", good, b"k", WORST_MSGPACK[name], b"z", good], records, invalid)
    assert list(records) == ["a", "z"]
    assert list(invalid) == ["k"]


@unhurried
@given(arrays_like(["5-2", "5-1", 2, "ff", "v"]))
def test_any_record_is_read_or_invalid(fields: list[Any]) -> None:
    with suppress(InvalidRecord):
        record = parse_record("k", msgpack.packb(fields, use_bin_type=False))
        assert record is not None
        order(record.mod_revision)


def test_wrong_types_are_named_with_a_command() -> None:
    found = {"{dynamo}:kv": "string", "{dynamo}:idx": "zset", "{dynamo}:log": "none", "other:x": "list"}
    assert describe_wrong_types(found) == (
        "{dynamo}:kv is a string and should be a hash: `redis-cli DEL '{dynamo}:kv'` mends it, and owners "
        "write theirs again; if another program wrote it, choose another DYN_REDIS_PREFIX"
    )
    assert not describe_wrong_types({"{dynamo}:kv": "hash"})
