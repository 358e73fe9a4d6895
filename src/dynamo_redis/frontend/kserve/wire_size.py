"""A look into a message before protobuf parses it. Pure.

Parsing takes many times the memory of a message of small fields, and blocks the interpreter. Only the texts
of a request have a reason to be large: all else together is bounded here. A large message is then one copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dynamo_redis.frontend.http.errors import ApiError

MOST_OTHER_BYTES: Final = 64 << 10
"""Most bytes of a request besides the contents of its tensors."""

_ID: Final = 3
_CONTENTS: Final = frozenset(((7,), (5, 5, 8)))
"""The paths of the numbers of texts: `raw_input_contents`, and `bytes_contents` in `contents` in `inputs`."""
_PARENTS: Final = frozenset(((5,), (5, 5)))

Path = tuple[int, ...]


class BrokenMessage(ValueError):
    """The bytes are no protobuf message."""


def check_size(message: memoryview) -> None:
    """Raise ApiError for a request with too much besides its texts, BrokenMessage for bytes that are none."""
    _count(message, (), 0)


def id_in(message: memoryview) -> str:
    """Return the `id` of a request, without parsing it; an empty string if it cannot be found soon."""
    other_bytes = 0
    try:
        for number, head_bytes, content in _fields(message):
            if number == _ID and content is not None:
                return str(content[:MOST_OTHER_BYTES], "utf-8", "replace")
            other_bytes += head_bytes
            if other_bytes > MOST_OTHER_BYTES:
                break
    except BrokenMessage:
        pass
    return ""


def _count(message: memoryview, at: Path, other_bytes: int) -> int:
    """Add the bytes of a message that are not those of texts."""
    for number, head_bytes, content in _fields(message):
        path = (*at, number)
        other_bytes += head_bytes
        if content is not None and path in _PARENTS:
            other_bytes = _count(content, path, other_bytes)
        elif content is not None and path not in _CONTENTS:
            other_bytes += len(content)
        if other_bytes > MOST_OTHER_BYTES:
            raise ApiError(
                413,
                f"All of the request but the contents of its tensors is over {MOST_OTHER_BYTES} bytes.",
                code="body_too_complex",
            )
    return other_bytes


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview | None]]:
    """Yield the number of each field, the bytes of its head, and its content; a scalar is all head.

    Source: protobuf.dev, "Encoding".
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise BrokenMessage("a field is cut")
            yield tag >> 3, at - start, message[at : at + size]
            at += size
            continue
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise BrokenMessage(f"there is no wire type {kind}")
        yield tag >> 3, at - start, None


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a number, and the place behind it."""
    value = 0
    for index, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, at + index + 1
    raise BrokenMessage("a number is cut")
