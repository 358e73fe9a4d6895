"""Bytes to send: frames of all kinds, malformed frames, and damage. Their repr is small, whatever their
size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from hypothesis import strategies as st

from dynamo_redis.wire import frame
from dynamo_redis.wire.codec import pack

MAX_PAYLOAD_BYTES: Final = 200_000
"""The largest message that the receiver of these bytes accepts."""

_KIB: Final = 1024


@dataclass(frozen=True)
class Long:
    """Repeating bytes: `head`, `unit` some number of times, `tail`."""

    head: bytes
    unit: bytes
    count: int
    tail: bytes = b""

    def __bytes__(self) -> bytes:
        return self.head + self.unit * self.count + self.tail


@dataclass(frozen=True)
class Edit:
    """One damage: remove bytes at `position` (modulo the length), and insert others."""

    position: int
    removed: int
    inserted: bytes


Piece = bytes | Long


def assemble(pieces: list[Piece], edits: list[Edit]) -> bytes:
    """Join the pieces, and damage them."""
    data = bytearray(b"".join(map(bytes, pieces)))
    for edit in edits:
        position = edit.position % (len(data) + 1)
        data[position : position + edit.removed] = edit.inserted
    return bytes(data)


_headers = {"id": "r-1", "deadline_ms": 5000, "meta": {"k": "v"}}

WELL_FORMED: Final = (
    pack([frame.OPEN, 1, "echo", 0, None, {"n": [1, 2.5, None, True, b"x"]}]),
    pack([frame.OPEN, 2, "echo", 1, _headers, "é"]),
    pack([frame.BATCH, 1, ["a", {"b": -1}]]),
    pack([frame.LAST_BATCH, 1, list(range(15))]),
    pack([frame.ERROR, 1, "overloaded", "full", {"retry_after_ms": 250}]),
    pack([frame.CREDIT, 1, 50]),
    pack([frame.CANCEL, 300, 2]),
    pack([frame.GOAWAY, 0, "draining", "bye"]),
    pack([frame.PING, 0, 1 << 40]),
    pack([frame.OPEN_RAW, 3, "echo", 0, _headers, 5, 1]) + b"12345",
    pack([frame.DATA_RAW, 1, 3, 0]) + b"\x92\x01\x02",
    pack([frame.LAST_RAW, 1, 0, 1]),
)

_HEADS: Final = bytes.fromhex(
    "90 91 93 80 81 a1 c0 c1 c4 c6 c7 c9 cb d3 d4 d6 d7 d8 d9 da db dc dd de df ff 0e"
)
"""The first bytes of the most varied msgpack types."""

scalars = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.sampled_from((0, 1, 2**31, 2**32, None, True, 1.5, "x", b"y", ""))
)

_any_frames = st.builds(
    lambda kind, rest: pack([kind, *rest]), st.integers(-1, 130) | scalars, st.lists(scalars, max_size=7)
)


def _raw(kind: int, announced: int, encoding: int, sent: int, byte: bytes) -> Long:
    fields = ("s", 0, None) if kind == frame.OPEN_RAW else ()
    return Long(pack([kind, 1, *fields, announced, encoding]), byte, sent)


_raw_frames = st.builds(
    _raw,
    st.sampled_from((frame.OPEN_RAW, frame.DATA_RAW, frame.LAST_RAW)),
    st.integers(0, 30) | st.sampled_from((MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1, 2**32 - 1, 2**32, -1)),
    st.integers(0, 2),
    st.integers(0, 30) | st.sampled_from((MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1)),
    st.sampled_from((b"\x00", b"\x91", b"\xc1")),
)

_nested = st.builds(
    lambda depth, unit, tail: Long(b"\x93\x02\x01", unit, depth, tail),
    st.integers(1, 30) | st.integers(1010, 1030),
    st.sampled_from((b"\x91", b"\x81\xc0", b"\x81", b"\xdc\x00\x01", b"\xdd\x00\x00\xff\xff")),
    st.sampled_from((b"\xc0", b"\x90", b"\x80", b"")),
)


def _text(length: int) -> Long:
    return Long(b"\x93\x02\x01\xdb" + length.to_bytes(4, "big"), b"x", length)


_long = st.builds(_text, st.integers(1, 300 * _KIB) | st.integers(128 * _KIB - 20, 128 * _KIB + 20))
_batch = st.builds(
    lambda count: Long(b"\x93\x03\x01\xdd" + count.to_bytes(4, "big"), b"\x05", count),
    st.integers(0, 40) | st.integers(65_530, 65_540),
)
_noise = st.binary(max_size=40) | st.lists(st.sampled_from(_HEADS), max_size=12).map(bytes)

pieces: st.SearchStrategy[list[Any]] = st.lists(
    st.one_of(st.sampled_from(WELL_FORMED), _any_frames, _raw_frames, _nested, _noise, _long, _batch),
    min_size=1,
    max_size=6,
)
edits = st.lists(st.builds(Edit, st.integers(0, 300), st.integers(0, 5), st.binary(max_size=3)), max_size=2)
splits = st.lists(st.integers(1, 40) | st.integers(1, 200 * _KIB), max_size=8)
