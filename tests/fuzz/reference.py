"""A second decoder of the wire, written from its description alone: slow, simple, over all bytes at once.

It shares nothing with `wire.decoder` but the limits and the error classes, and no line with msgpack's
unpacker, so what both say is probably right.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

MAX_FRAME_BYTES: Final = 128 * 1024
MAX_ELEMENTS: Final = 64 * 1024
MAX_DEPTH: Final = 1024
"""The deepest nesting of arrays and maps, the frame and its batch included."""

_RAW_FIELDS: Final = {14: 7, 15: 4, 16: 4}
_SCALARS: Final = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"} | {
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LENGTHS: Final = {
    **dict.fromkeys((0xC4, 0xC7, 0xD9), ">B"),
    **dict.fromkeys((0xC5, 0xC8, 0xDA, 0xDC, 0xDE), ">H"),
    **dict.fromkeys((0xC6, 0xC9, 0xDB, 0xDD, 0xDF), ">I"),
}


class Broken(Exception):
    """The bytes are no frame, whatever follows."""


class Partial(Exception):
    """The bytes end in the middle of a frame."""


@dataclass
class Decoded:
    """The result of decoding a sequence of bytes.

    A raw payload stands as the last field of its frame: its value, or the word `too large` or `no msgpack`.
    """

    frames: list[list[Any]] = field(default_factory=list)
    violation: bool = False
    between_frames: bool = True


def decode(data: bytes, max_payload_bytes: int) -> Decoded:
    """Decode all frames in `data`, in order."""
    recursion_limit = sys.getrecursionlimit()
    sys.setrecursionlimit(recursion_limit + 4 * MAX_DEPTH)  # it reads nested values by recursion
    try:
        return _decode(data, max_payload_bytes)
    finally:
        sys.setrecursionlimit(recursion_limit)


def _decode(data: bytes, max_payload_bytes: int) -> Decoded:
    decoded, offset = Decoded(), 0
    while offset < len(data) and not decoded.violation:
        reader = Reader(data, offset)
        try:
            frame = reader.frame()
            if reader.offset - offset > MAX_FRAME_BYTES:
                raise Broken
            offset = reader.offset
            if frame[0] in _RAW_FIELDS:
                offset = _raw(frame, data, offset, max_payload_bytes, decoded)
            else:
                decoded.frames.append(frame)
        except Partial:
            decoded.between_frames = False
            decoded.violation = reader.is_frame and len(data) - offset > MAX_FRAME_BYTES
            break
        except Broken:
            decoded.violation = True
    return decoded


def _raw(frame: list[Any], data: bytes, offset: int, limit: int, decoded: Decoded) -> int:
    size, encoding = frame[-2:]
    if len(frame) != _RAW_FIELDS[frame[0]] or type(size) is not int or encoding not in (0, 1):
        raise Broken
    if not 0 <= size < 2**32:
        raise Broken
    if size > limit:
        decoded.frames.append([*frame[:-1], "too large"])
        if offset + size > len(data):
            decoded.between_frames = False
        return offset + size
    payload = data[offset : offset + size]
    if len(payload) < size:
        decoded.between_frames = False
        return len(data)
    decoded.frames.append([*frame[:-1], payload if encoding == 1 else _value(payload)])
    return offset + size


def _value(payload: bytes) -> Any:
    """Return the one value of a raw payload, or the words that stand for none."""
    reader = Reader(payload, 0)
    try:
        value = reader.value(0)
    except (Broken, Partial):
        return "no msgpack"
    return value if reader.offset == len(payload) else "no msgpack"


class Reader:
    """Reads msgpack from an offset on."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self.offset = offset
        self.is_frame = False

    def frame(self) -> list[Any]:
        self.is_frame = True
        value = self.value(0)
        if type(value) is not list or len(value) < 2:
            raise Broken
        try:
            hash(value[0])
        except TypeError:
            raise Broken from None
        return value

    def value(self, depth: int) -> Any:
        """Read one value inside of `depth` containers."""
        [first] = self._take(1)
        if first in _SCALARS:
            return struct.unpack(_SCALARS[first], self._take(struct.calcsize(_SCALARS[first])))[0]
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if first in (0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
            return self.extension(1 << (first - 0xD4))
        if first == 0xC1:
            raise Broken
        return self._sized(first, depth)

    def _sized(self, first: int, depth: int) -> Any:
        if first < 0x90:
            return self._map(first & 0x0F, depth)
        if first < 0xA0:
            return self._array(first & 0x0F, depth)
        if first < 0xC0:
            return self._string(first & 0x1F)
        [length] = struct.unpack(_LENGTHS[first], self._take(struct.calcsize(_LENGTHS[first])))
        if first <= 0xC6:
            return self._take(length)
        if first <= 0xC9:
            return self.extension(length)
        if first <= 0xDB:
            return self._string(length)
        return self._array(length, depth) if first <= 0xDD else self._map(length, depth)

    def _array(self, length: int, depth: int) -> list[Any]:
        self._check(length, MAX_ELEMENTS, depth)
        return [self.value(depth + 1) for _ in range(length)]

    def _map(self, length: int, depth: int) -> dict[Any, Any]:
        self._check(length, MAX_ELEMENTS, depth)
        found: dict[Any, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            value = self.value(depth + 1)
            try:
                found[key] = value
            except TypeError:
                raise Broken from None
        return found

    def _string(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise Broken from None

    def extension(self, length: int) -> Any:
        if length == 2**32 - 1:
            raise Broken  # with its type it is longer than any length
        [code] = struct.unpack(">b", self._take(1))
        content = self._take(length)
        try:
            return (
                msgpack.Timestamp.from_bytes(content).to_unix()
                if code == -1
                else msgpack.ExtType(code, content)
            )
        except ValueError:
            raise Broken from None

    def _check(self, length: int, limit: int, depth: int) -> None:
        if depth >= MAX_DEPTH or (self.is_frame and length > limit):
            raise Broken

    def _take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self._data):
            raise Partial
        taken = self._data[self.offset : end]
        self.offset = end
        return taken
