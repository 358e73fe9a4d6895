"""Formats of the last release, and of later minor and major versions, against the present code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from tools.golden_formats import FORMATS, golden, written

from dynamo_redis.errors import BarrierError, SchemaMismatch
from tests.later_formats import LATER, later_array, later_batch, later_fields, later_json

GOLDEN = golden()
each_format = pytest.mark.parametrize("name", FORMATS)


def extended(name: str, content: bytes) -> bytes:
    """Return a format's bytes as a later minor version may write them."""
    arrays: dict[str, Callable[[bytes], bytes]] = {
        "registry record": later_array,
        "entry of the change log": later_fields,
        "manifest of an object": later_fields,
    }
    if FORMATS[name].kind == "json":
        return json.dumps(later_json(json.loads(content))).encode()
    return arrays.get(name, later_batch)(content)


def has_all(last: Any, now: Any) -> bool:
    """Return whether a value has all that another one has, at the same places: so its readers find it."""
    if isinstance(last, dict):
        return isinstance(now, dict) and all(name in now and has_all(last[name], now[name]) for name in last)
    if isinstance(last, list):
        return (
            isinstance(now, list)
            and len(now) >= len(last)
            and all(has_all(part, other) for part, other in zip(last, now, strict=False))
        )
    return type(last) is type(now) and last == now


def unpacked(name: str, content: bytes) -> Any:
    if FORMATS[name].kind == "json":
        return json.loads(content)
    parts = msgpack.unpackb(content, raw=True)
    if name in ("entry of the change log", "manifest of an object"):
        return dict(zip(parts[::2], parts[1::2], strict=True))
    return parts


def known(value: Any) -> Any:
    """Return what a record says apart from the fields that this release does not know."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        return {name: known(part) for name, part in value.items() if name not in LATER}
    if isinstance(value, list):
        return [known(part) for part in value]
    return value


def test_each_format_has_a_golden_form() -> None:
    assert GOLDEN.keys() == FORMATS.keys()


@each_format
def test_this_release_reads_what_the_last_one_wrote(name: str) -> None:
    decode = FORMATS[name].decode
    found = decode(GOLDEN[name])
    assert found == decode(written()[name])
    assert not getattr(found, "model_extra", None), "a field of the last release has no meaning any more"


@each_format
def test_the_last_release_finds_its_fields(name: str) -> None:
    assert has_all(unpacked(name, GOLDEN[name]), unpacked(name, written()[name])), (
        "a field is gone, or has another meaning: that is another major version"
    )


@each_format
def test_fields_of_a_later_minor_version_are_ignored(name: str) -> None:
    decode = FORMATS[name].decode
    found = decode(extended(name, GOLDEN[name]))
    if name == "load":
        (event,) = found.events
        assert known(event) == decode(GOLDEN[name]).events[0]
    else:
        assert known(found) == known(decode(GOLDEN[name]))


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.version_at is not None])
def test_an_unknown_major_version_is_refused_by_name(name: str) -> None:
    value = unpacked(name, GOLDEN[name])
    value[FORMATS[name].version_at] = 2
    packed = json.dumps(value).encode() if FORMATS[name].kind == "json" else msgpack.packb(value)
    with pytest.raises(
        SchemaMismatch, match=r"has schema version 2, this release reads 1: upgrade the older"
    ):
        FORMATS[name].decode(packed)


def test_an_unknown_major_version_of_a_manifest_is_refused() -> None:
    name = "manifest of an object"
    fields = unpacked(name, GOLDEN[name]) | {b"v": b"2"}
    packed = msgpack.packb([part for pair in fields.items() for part in pair])
    with pytest.raises(SchemaMismatch, match=r"version 2 with codec .* reads 1 with codec .*: upgrade"):
        FORMATS[name].decode(packed)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("barrier")])
def test_an_unknown_major_version_ends_a_barrier(name: str) -> None:
    value = unpacked(name, GOLDEN[name]) | {"version": 2}
    with pytest.raises(BarrierError, match=r"has schema version 2, this release reads 1: upgrade the older"):
        FORMATS[name].decode(json.dumps(value).encode())
