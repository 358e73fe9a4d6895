"""Readers of the http plane's contents: any bytes give a value, or the one error that each documents."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.errors import InvalidRequest, Overloaded, PlaneError
from dynamo_redis.planes.http import content
from dynamo_redis.wire.codec import pack
from tests.rubbish import DEEP, WORST_JSON, json_values

DETAILS = st.one_of(
    json_values(), st.fixed_dictionaries({"retry_after_ms": st.one_of(json_values(), st.integers())})
)
CODES = st.sampled_from([PlaneError.code, Overloaded.code, "payload_too_large", "", "unknown"])


def packed(value: Any) -> bytes:
    try:
        return pack(value)
    except TypeError:  # an integer of more than 64 bits
        return b""


WORST_MSGPACK = {
    "nothing": b"",
    "a reserved byte": b"\xc1",
    "a huge array": b"\xdd\xff\xff\xff\xff",
    "huge arrays in arrays": b"\xdd\x00\xff\xff\xff" * 1000,
    "a huge map": b"\xdf\xff\xff\xff\xff",
    "a huge text": b"\xdb\xff\xff\xff\xff",
    "deep arrays": b"\x91" * DEEP + b"\x01",
    "a map as key": b"\x81\x80\x01",
    "an array as key": b"\x81\x90\x01",
    "no UTF-8": b"\xa1\xff",
    "a malformed timestamp": b"\xc7\x05\xff12345",
    "a timestamp of too many nanoseconds": b"\xd7\xff" + b"\xff" * 8,
    "two values": b"\x01\x02",
}


@given(st.one_of(st.binary(), json_values().map(lambda value: json.dumps(value).encode())))
def test_request_in_json_is_read_or_invalid(body: bytes) -> None:
    with suppress(InvalidRequest):
        content.read_json(body)


@pytest.mark.parametrize("name", WORST_JSON)
def test_worst_json_is_read_or_invalid(name: str) -> None:
    test_request_in_json_is_read_or_invalid.hypothesis.inner_test(WORST_JSON[name])  # type: ignore[attr-defined]


@given(st.one_of(st.binary(), json_values().map(packed)))
def test_request_in_msgpack_is_read_or_invalid(body: bytes) -> None:
    with suppress(InvalidRequest):
        content.read_msgpack(body)


@given(st.binary())
def test_end_of_an_answer_is_read_or_malformed(ending: bytes) -> None:
    try:
        error = content.read_end(ending)
    except ValueError:
        return
    assert error is None or isinstance(error, PlaneError)


@given(CODES, st.text(), DETAILS)
def test_end_with_any_details_is_an_error(code: str, message: str, details: Any) -> None:
    try:
        ending = pack([code, message, details])
    except TypeError:
        return
    error = content.read_end(ending)
    assert isinstance(error, PlaneError)
    assert message[:100] in str(error)
    assert 0 <= (getattr(error, "retry_after_s", None) or 0) <= 3600


@given(st.integers(min_value=0, max_value=999), st.binary())
def test_problem_is_an_error_whatever_the_bytes(status: int, body: bytes) -> None:
    assert isinstance(content.read_problem(status, body), PlaneError)


@given(st.one_of(CODES, json_values()), json_values(), DETAILS)
def test_problem_with_any_fields_is_an_error(code: Any, detail: Any, others: Any) -> None:
    document = {**(others if isinstance(others, dict) else {}), "code": code, "detail": detail}
    error = content.read_problem(503, json.dumps(document).encode())
    assert isinstance(error, PlaneError)
    assert isinstance(str(error), str)
    assert 0 <= (getattr(error, "retry_after_s", None) or 0) <= 3600


def test_problem_with_an_endless_wait_is_bounded() -> None:
    body = b'{"code": "overloaded", "detail": "", "retry_after_ms": %s}' % (b"9" * 4000)
    error = content.read_problem(503, body)
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 3600


def test_deepest_item_is_json_or_a_value_error() -> None:
    """MessagePack carries items that nest deeper than the JSON writer of some Pythons goes."""
    item = content.read_msgpack(b"\x91" * 1010 + b"\xc0")
    try:
        written = content.json_lines([item])
    except ValueError as exc:
        assert "too deep" in str(exc)  # noqa: PT017 - one of two right ends
    else:
        assert written == b"[" * 1010 + b"null" + b"]" * 1010 + b"\n"


def test_items_beyond_json_have_a_form_of_their_own() -> None:
    assert content.json_lines([b"\0", msgpack.ExtType(5, b"\0")]) == b'"AA=="\n[5,"AA=="]\n'


def read_items(parts: list[bytes]) -> list[Any]:
    unpacker = content.new_answer_unpacker(1 << 20)
    items: list[Any] = []
    for part in parts:
        unpacker.feed(part)
        items += unpacker
    return items


@given(st.lists(st.binary()))
def test_answer_is_read_or_of_known_errors(parts: list[bytes]) -> None:
    with suppress(*content.UNPACK_ERRORS):
        read_items(parts)


@pytest.mark.parametrize("name", WORST_MSGPACK)
def test_worst_msgpack_is_read_or_of_known_errors(name: str) -> None:
    body = WORST_MSGPACK[name]
    test_request_in_msgpack_is_read_or_invalid.hypothesis.inner_test(body)  # type: ignore[attr-defined]
    test_answer_is_read_or_of_known_errors.hypothesis.inner_test([body])  # type: ignore[attr-defined]
    test_end_of_an_answer_is_read_or_malformed.hypothesis.inner_test(body)  # type: ignore[attr-defined]


@given(st.lists(json_values().filter(lambda value: not isinstance(value, float) or not math.isnan(value))))
def test_answer_is_read_whatever_its_parts(items: list[Any]) -> None:
    try:
        data = b"".join(map(pack, items)) + content.msgpack_end()
    except TypeError:
        return
    found = read_items([data[place : place + 1] for place in range(len(data))])
    assert repr(found[:-1]) == repr(items)
    assert isinstance(found[-1], content.End)
    assert content.read_end(found[-1].content) is None


@given(st.text())
def test_content_type_is_known_or_not(value: str) -> None:
    assert content.is_msgpack(value) in (True, False, None)
