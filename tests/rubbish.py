"""Values that other programs may write where this package reads: the worst known ones, and generated ones."""

from __future__ import annotations

import json
import math
from typing import Any

import msgpack
from hypothesis import strategies as st

DEEP = 20_000

WORST_JSON: dict[str, bytes] = {
    "nothing": b"",
    "no text": b"\xff\xfe",
    "UTF-16": "{}".encode("utf-16"),
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "open lists": b"[" * DEEP,
    "deep objects": b'{"version":' * DEEP + b"1" + b"}" * DEEP,
    "an infinite version": b'{"version":1e999}',
    "a version that is no number": b'{"version":NaN}',
    "a version of thousands of digits": b'{"version":' + b"9" * 5000 + b"}",
    "a later major version": b'{"version":99}',
    "half a character": rb'{"version":1,"namespace":"\ud800"}',
}
"""Whole records that are invalid, whatever kind of JSON is expected."""

WORST_VALUES: dict[str, str] = {
    "infinity": "1e999",
    "NaN": "NaN",
    "a huge integer": "1208925819614629174706176",
    "thousands of digits": "9" * 5000,
    "an integer of 64 bits": str(1 << 63),
    "a negative": "-5",
    "a fraction": "1.5",
    "true": "true",
    "null": "null",
    "half a character": r'"\ud800"',
    "NUL": r'"\u0000"',
    "a path": '"../.."',
    "long text": f'"{"a" * 100_000}"',
    "a list": '["x"]',
    "an object": '{"a": {"b": []}}',
    "deep lists": "[" * DEEP + "]" * DEEP,
}
"""Values of one field, as JSON text."""


def with_field(record: dict[str, Any], field: str, text: str) -> bytes:
    """Return a record in which one field holds that JSON text."""
    marker = "@@here@@"
    return json.dumps({**record, field: marker}).replace(f'"{marker}"', text).encode()


def json_values() -> st.SearchStrategy[Any]:
    """Draw any JSON value."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=8,
    )


def records_like(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Draw records that are almost right: some fields are replaced, or missing, or there are others."""
    changes = st.dictionaries(st.sampled_from(sorted(good)) | st.text(max_size=8), json_values(), max_size=3)
    missing = st.sets(st.sampled_from(sorted(good)), max_size=2)

    def make(changed: dict[str, Any], left_out: set[str]) -> bytes:
        fields = {name: value for name, value in {**good, **changed}.items() if name not in left_out}
        return json.dumps(fields).encode()

    return st.builds(make, changes, missing)


WORST_MSGPACK: dict[str, bytes] = {
    "nothing": b"",
    "nil": b"\xc0",
    "a number": b"\x7b",
    "text": msgpack.packb("x" * 100),
    "JSON": b'{"edited": "by hand"}',
    "a map": msgpack.packb({"version": 1}),
    "deep arrays": b"\x91" * DEEP,
    "deep maps": b"\x81\xa1a" * 5000,
    "an array without its content": b"\xdd\xff\xff\xff\xff",
    "text without its content": b"\xdb\xff\xff\xff\xff",
    "an extension": b"\xc7\x05\x01hello",
    "a time": b"\xd6\xff\xff\xff\xff\xff",
    "a map with a list as key": b"\x81\x91\x01\x01",
    "infinities": msgpack.packb([math.inf] * 8),
    "numbers out of range": msgpack.packb([1, "t", -1, 1 << 63, -1, (1 << 64) - 1, 0, []]),
    "no UTF-8": b"\x98" + b"\x01" + b"\xa2\xff\xfe" + b"\x00" * 5 + b"\x90",
}
"""Whole values that are invalid where an array in msgpack is expected."""


def msgpack_values() -> st.SearchStrategy[Any]:
    """Draw any value of msgpack."""
    integers = st.integers(-(1 << 63), (1 << 64) - 1)
    leaves = (
        st.none() | st.booleans() | integers | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
    )
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=8,
    )


def arrays_like(good: list[Any]) -> st.SearchStrategy[list[Any]]:
    """Draw arrays that are almost right: up to two parts are replaced, or the end is missing, or there is
    more."""
    places = st.dictionaries(st.integers(0, len(good) - 1), msgpack_values(), max_size=2)

    def make(changed: dict[int, Any], length: int, more: list[Any]) -> list[Any]:
        return [changed.get(place, part) for place, part in enumerate(good)][:length] + more

    return st.builds(make, places, st.integers(0, len(good)), st.lists(msgpack_values(), max_size=2))
