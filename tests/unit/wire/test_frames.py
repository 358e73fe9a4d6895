"""Frames to bytes and back: golden bytes, every split point, and bytes that are no frame."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_redis.errors import InvalidRequest, PayloadTooLarge, ProtocolViolation
from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import MAX_FRAME_BYTES, MAX_INLINE_BYTES, READ_BYTES, pack, unpack
from dynamo_redis.wire.decoder import UNPACKED_AT_ONCE_BYTES, FrameDecoder, ReadBuffers, Unusable

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "frames.json").read_text())
MIB = 1 << 20


def decoder(max_payload_bytes: int = 4 * MIB) -> FrameDecoder:
    return FrameDecoder(ReadBuffers(), max_payload_bytes)


def decode(data: bytes, sizes: list[int], max_payload_bytes: int = 4 * MIB) -> tuple[list[Any], FrameDecoder]:
    """Decode as a socket would deliver: pieces of the given sizes, then the rest."""
    made, frames, offset = decoder(max_payload_bytes), [], 0
    for size in [*sizes, len(data)]:
        while size and offset < len(data):
            room = made.buffer()
            count = min(size, len(room), len(data) - offset)
            room[:count] = data[offset : offset + count]
            frames += made.received(count)
            offset, size = offset + count, size - count
    return frames, made


# --------------------------------------------------------------------------- golden bytes


@pytest.mark.parametrize("vector", VECTORS["frames"], ids=lambda vector: vector["name"])
def test_golden_frames_decode(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"].replace(" ", ""))
    frames, made = decode(data, [])
    assert frames == [vector["frame"]]
    assert made.is_between_frames


ENCODERS = {
    "open": lambda: frame.encode_open(1, frame.plain_route("1a/dynamo/backend/generate"), pack({"n": 2})),
    "open with headers, request stream": lambda: frame.encode_open(
        2,
        frame.encode_route(
            "1a/d/b/g", 1, frame.encode_headers({"id": "r-1", "deadline_ms": 1500, "meta": {"k": "v"}})
        ),
        pack("x"),
    ),
    "data": lambda: frame.encode_items(1, [pack("hi")], last=False),
    "batch": lambda: frame.encode_items(1, [pack("a"), pack("b")], last=False),
    "end": lambda: frame.encode_end(1),
    "last": lambda: frame.encode_items(1, [pack("hi")], last=True),
    "last batch": lambda: frame.encode_items(1, [pack("a"), pack("b")], last=True),
    "error": lambda: frame.encode_error(1, "overloaded", "full", {"retry_after_ms": 250}),
    "accept": lambda: frame.encode_accept(300),
    "credit": lambda: frame.encode_credit(1, 50),
    "cancel, stop": lambda: frame.encode_cancel(1, frame.Strength.STOP),
    "cancel, kill": lambda: frame.encode_cancel(1, frame.Strength.KILL),
    "goaway": lambda: frame.encode_goaway("draining", "bye"),
    "ping": lambda: frame.encode_ping(7),
    "pong": lambda: frame.encode_pong(7),
}


@pytest.mark.parametrize("vector", VECTORS["frames"], ids=lambda vector: vector["name"])
def test_encoded_frames_equal_the_golden_bytes(vector: dict[str, Any]) -> None:
    assert ENCODERS[vector["name"]]().hex() == vector["hex"].replace(" ", "")


def test_every_encoder_has_a_vector() -> None:
    assert {vector["name"] for vector in VECTORS["frames"]} == set(ENCODERS)


@pytest.mark.parametrize("count", [1, 15, 16, 255, 65_535, 65_536])
def test_batch_is_an_array_of_any_length(count: int) -> None:
    [decoded], _ = decode(frame.encode_items(9, [pack(None)] * count, last=True), [])
    assert decoded == ([frame.LAST, 9, None] if count == 1 else [frame.LAST_BATCH, 9, [None] * count])


# --------------------------------------------------------------------------- split points


@pytest.mark.parametrize("headers", [None, {}, {"id": "x", "traceparent": "y", "meta": {"k": "v"}}])
def test_deadline_joins_packed_headers(headers: dict[str, Any] | None) -> None:
    packed = frame.add_deadline(frame.encode_headers(headers), 1500)
    assert unpack(packed) == {**(headers or {}), "deadline_ms": 1500}


def conversation() -> tuple[list[bytes], list[Any]]:
    """Frames of all kinds, each with its raw bytes, and what they decode to."""
    blob = random.Random(1).randbytes(MAX_INLINE_BYTES + 1000)
    text = "é" * MAX_INLINE_BYTES
    packed_text = pack(text)
    route = frame.encode_route("s", 0, frame.encode_headers({"id": "x"}))
    pieces = [
        frame.encode_open(1, route, pack([1, {"a": b"b"}])),
        frame.encode_item_raw(1, len(blob), frame.Encoding.BINARY, last=False) + blob,
        frame.encode_items(1, [pack(n) for n in range(20)], last=False),
        frame.encode_open_raw(2, route, len(packed_text), frame.Encoding.MSGPACK) + packed_text,
        frame.encode_item_raw(1, 0, frame.Encoding.BINARY, last=True),
        frame.encode_ping(1 << 40),
    ]
    frames = [
        [frame.OPEN, 1, "s", 0, {"id": "x"}, [1, {"a": b"b"}]],
        [frame.DATA_RAW, 1, len(blob), blob],
        [frame.BATCH, 1, list(range(20))],
        [frame.OPEN_RAW, 2, "s", 0, {"id": "x"}, len(packed_text), text],
        [frame.LAST_RAW, 1, 0, b""],
        [frame.PING, 0, 1 << 40],
    ]
    return pieces, frames


PIECES, DECODED = conversation()
CONVERSATION = b"".join(PIECES)
ENDS = {0, *accumulate(map(len, PIECES))}


def test_every_split_point_near_a_boundary() -> None:
    for end in ENDS:
        for split in range(max(1, end - 20), min(end + 40, len(CONVERSATION))):
            frames, made = decode(CONVERSATION, [split])
            assert frames == DECODED, split
            assert made.is_between_frames


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100_000), max_size=12))
def test_any_splitting_gives_the_same_frames(sizes: list[int]) -> None:
    frames, made = decode(CONVERSATION, sizes)
    assert frames == DECODED
    assert made.is_between_frames


def test_byte_by_byte() -> None:
    data = PIECES[0]
    frames, made = decode(data, [1] * len(data))
    assert frames == DECODED[:1]
    assert made.is_between_frames


@given(st.integers(0, len(CONVERSATION) - 1))
@settings(max_examples=60, deadline=None)
def test_truncated_stream_is_known_to_be_truncated(length: int) -> None:
    frames, made = decode(CONVERSATION[:length], [])
    assert frames == DECODED[: len(frames)]
    assert made.error is None
    assert made.is_between_frames == (length in ENDS)


def test_connections_share_unpackers() -> None:
    buffers = ReadBuffers()
    decoders = [FrameDecoder(buffers, MIB) for _ in range(50)]
    ping = frame.encode_ping(3)
    for made in decoders:
        assert made.feed(memoryview(ping)) == [[frame.PING, 0, 3]]
    assert len(buffers._spare) == 1
    for made in decoders:
        assert made.feed(memoryview(ping[:2])) == []
    for made in decoders:
        assert made.feed(memoryview(ping[2:])) == [[frame.PING, 0, 3]]
    assert len(buffers._spare) <= 4


# --------------------------------------------------------------------------- what is not a frame


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xc1", "a byte that msgpack does not use"),
        (b"\x05", "a frame is an array"),
        (b"\x90", "an empty array"),
        (b"\x91\x04", "no stream id"),
        (b"\x91" * 2000, "nested past the limit"),
        (b"\xdd\xff\xff\xff\xff", "an array of 2**32 elements"),
        (b"\xdf\xff\xff\xff\xff", "a map of 2**32 elements"),
        (b"\x93\x02\x01\xa1\xff", "a string that is not UTF-8"),
        (b"\x93\x91\x01\x02\x03", "a type that is an array"),
        (pack([frame.DATA_RAW, 1, -1, 0]), "a negative size"),
        (pack([frame.DATA_RAW, 1, 2**32, 0]), "a size past any limit"),
        (pack([frame.DATA_RAW, 1, 2**63, 0]), "a huge size"),
        (pack([frame.DATA_RAW, 1, 1.0, 0]), "a size that is no integer"),
        (pack([frame.DATA_RAW, 1, 1, 9]), "an unknown encoding"),
        (pack([frame.DATA_RAW, 1, 1]), "a raw header without encoding"),
        (pack([frame.OPEN_RAW, 1, 1, 0]), "an OPEN_RAW without its fields"),
    ],
)
def test_garbage_is_a_violation(data: bytes, reason: str) -> None:
    frames, made = decode(frame.encode_ping(1) + data, [])
    assert frames == [[frame.PING, 0, 1]], "what came before it counts"
    assert isinstance(made.error, ProtocolViolation), reason
    assert made.feed(memoryview(frame.encode_ping(2))) == [], "nothing is decoded after it"


@pytest.mark.parametrize(
    "start",
    [b"\x93\x02\x01\xdc\xff\xff", b"\x93\x02\x01\xdb\xff\xff\xff\xff", b"\x93\x02\x01\xc6\xff\xff\xff\xff"],
)
def test_frame_that_grows_past_the_limit_is_a_violation(start: bytes) -> None:
    made, fed_bytes = decoder(), 0
    made.feed(memoryview(start))
    while made.error is None:
        made.feed(memoryview(pack("x" * 1000)))
        fed_bytes += 1003
        assert fed_bytes < MAX_FRAME_BYTES + 2000


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=8))
def test_random_bytes_never_raise(data: bytes, sizes: list[int]) -> None:
    decode(data, sizes)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_frames_never_raise(data: st.DataObject) -> None:
    damaged = bytearray(CONVERSATION[:40] + CONVERSATION[-60:])
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    decode(bytes(damaged), data.draw(st.lists(st.integers(1, 50), max_size=5)))


# --------------------------------------------------------------------------- raw payloads


@pytest.mark.parametrize("sizes", [[], [5], [10, 1, 1, 1], [50_000], [1_000_000, 3]])
def test_payload_over_the_limit_is_skipped(sizes: list[int]) -> None:
    header = frame.encode_item_raw(4, 2 * MIB, frame.Encoding.BINARY, last=False)
    data = header + bytes(2 * MIB) + frame.encode_end(4)
    [first, second], made = decode(data, sizes, max_payload_bytes=MIB)
    assert first[:3] == [frame.DATA_RAW, 4, 2 * MIB]
    assert isinstance(first[3], Unusable)
    assert isinstance(first[3].error, PayloadTooLarge)
    assert (first[3].error.size_bytes, first[3].error.limit_bytes) == (2 * MIB, MIB)
    assert second == [frame.END, 4]
    assert made.is_between_frames


def test_payload_that_is_no_msgpack_fails_its_stream_only() -> None:
    bad = b"\x91" * 3000
    data = frame.encode_item_raw(4, len(bad), frame.Encoding.MSGPACK, last=True) + bad + frame.encode_ping(1)
    [first, second], made = decode(data, [])
    assert isinstance(first[3], Unusable)
    assert isinstance(first[3].error, InvalidRequest)
    assert second == [frame.PING, 0, 1]
    assert made.error is None


def test_large_bytes_are_not_packed() -> None:
    value = bytes(MAX_INLINE_BYTES + 1)
    payload = frame.payload_of(value)
    assert payload is value
    assert frame.encoding_of(payload, value) is frame.Encoding.BINARY


@pytest.mark.parametrize(
    ("size_bytes", "cost"), [(0, 1), (65_535, 1), (65_536, 2), (65_537, 2), (131_072, 3), (32 * MIB, 513)]
)
def test_credit_cost_of_a_raw_payload(size_bytes: int, cost: int) -> None:
    assert frame.raw_cost(size_bytes) == cost


# --------------------------------------------------------------------------- large packed values


LARGE_VALUES: dict[str, Any] = {
    "many lists": [[number, "x" * (number % 50)] for number in range(50_000)],
    "a long string": {"text": "é" * MIB},
    "bytes within": [b"x" * MIB, {"more": b"y" * 70_000}, None, 1.5, -1, 2**63],
    "token ids": list(range(400_000)),
}


def raw_of(payload: bytes, size_bytes: int | None = None) -> bytes:
    return pack([frame.DATA_RAW, 1, len(payload) if size_bytes is None else size_bytes, 0]) + payload


@pytest.mark.parametrize("value", LARGE_VALUES.values(), ids=LARGE_VALUES)
@pytest.mark.parametrize("piece_bytes", [1000, 65_536])
def test_large_value_is_unpacked_as_it_comes(value: Any, piece_bytes: int) -> None:
    data = raw_of(pack(value)) + pack([frame.END, 1])
    frames, made = decode(data, [piece_bytes] * (len(data) // piece_bytes))
    assert len(pack(value)) > UNPACKED_AT_ONCE_BYTES
    assert [received[:2] for received in frames] == [[frame.DATA_RAW, 1], [frame.END, 1]]
    assert frames[0][3] == value
    assert made.share.held_bytes == 0


def test_reads_of_a_large_value_are_short() -> None:
    """No read may hold the event loop for long."""
    made = decoder()
    made.feed(memoryview(raw_of(b"", 3 * MIB)))
    assert 0 < len(made.buffer()) <= READ_BYTES


_LARGE = pack([None] * (2 * MIB))


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (_LARGE + b"\xc0", "its value has"),
        (_LARGE[:-1], "does not end"),
        (b"\xc1" + _LARGE, "FormatError"),
        (b"\x91" * 2 * MIB, "StackError"),
        (b"\x81\x80\xc0" + _LARGE, "TypeError"),
    ],
    ids=["more than one", "cut", "no msgpack", "too deep", "a map as key"],
)
def test_broken_large_value_costs_its_stream_only(payload: bytes, why: str) -> None:
    made = decoder()
    data = memoryview(raw_of(payload) + pack([frame.END, 2]))
    frames = made.feed(data)
    assert made.error is None
    assert [received[:2] for received in frames] == [[frame.DATA_RAW, 1], [frame.END, 2]]
    broken = frames[0][3]
    assert isinstance(broken, Unusable)
    assert isinstance(broken.error, InvalidRequest)
    assert why in str(broken.error)
    assert made.share.held_bytes == 0
