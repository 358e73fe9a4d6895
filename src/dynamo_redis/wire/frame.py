"""The frames of the tcp plane: their types, and how each is written.

A frame is a msgpack array `[type, stream_id, …]`. The type is a small integer; with `OPTIONAL` set, a peer
that does not know it skips the frame, otherwise an unknown type is a protocol error. `stream_id` is 0 for
frames about the connection. docs/wire-protocol.md describes every frame byte by byte.

    OPEN        [1, id, subject, flags, headers, request]         client → server
    DATA        [2, id, item]                                     both
    BATCH       [3, id, [item, …]]                                both
    END         [4, id]                                           both
    LAST        [5, id, item]              DATA + END             both
    LAST_BATCH  [6, id, [item, …]]         BATCH + END            both
    ERROR       [7, id, code, message, details]                   server → client
    ACCEPT      [8, id]                                           server → client
    CREDIT      [9, id, count]                                    both
    CANCEL      [10, id, strength]         1 stop, 2 kill         client → server
    GOAWAY      [11, 0, code, message]                            both
    PING, PONG  [12, 0, token], [13, 0, token]                    both
    OPEN_RAW    [14, id, subject, flags, headers, size, encoding] then `size` raw bytes
    DATA_RAW    [15, id, size, encoding]                          then `size` raw bytes
    LAST_RAW    [16, id, size, encoding]                          then `size` raw bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final

from dynamo_redis.errors import PayloadTooLarge
from dynamo_redis.wire.codec import (
    MAX_DEPTH,
    MAX_HEADERS_BYTES,
    MAX_INLINE_BYTES,
    array_header,
    check_depth,
    pack,
    pack_known,
    pack_plain,
    pack_with_care,
    unpack,
)

OPEN: Final = 1
DATA: Final = 2
BATCH: Final = 3
END: Final = 4
LAST: Final = 5
LAST_BATCH: Final = 6
ERROR: Final = 7
ACCEPT: Final = 8
CREDIT: Final = 9
CANCEL: Final = 10
GOAWAY: Final = 11
PING: Final = 12
PONG: Final = 13
OPEN_RAW: Final = 14
DATA_RAW: Final = 15
LAST_RAW: Final = 16

OPTIONAL: Final = 0x40
"""Set in the type of a frame that a peer may skip. Such a frame never announces raw bytes."""

FLAG_REQUEST_STREAM: Final = 1
"""In OPEN: more messages follow the request, until END."""

MAX_DEADLINE_MS: Final = 2**53
"""The largest `deadline_ms`, 285,000 years: a later deadline is sent as this one."""

MAX_STREAM_ID: Final = 2**31 - 1
"""The last stream id of a connection; then the client opens another connection."""

CREDIT_UNIT_BYTES: Final = MAX_INLINE_BYTES
"""A raw payload costs one credit for each started unit of this size; any other item costs one."""


class Encoding(IntEnum):
    """The form of a payload's raw bytes."""

    MSGPACK = 0  # one packed value
    BINARY = 1  # the content of a `bytes` value, as it is


class Strength(IntEnum):
    """The strength of a cancellation."""

    STOP = 1
    KILL = 2


Headers = Mapping[str, Any]
"""The headers of a request: `id` str, `deadline_ms` int (the time that remains), `traceparent` str, `meta`
map of str to str. All may be absent; unknown ones are ignored."""

NO_HEADERS: Final = b"\xc0"
"""Packed headers of a request that has none."""

_EMPTY_MAP = b"\x80"
_DEADLINE_KEY = pack_known("deadline_ms")
_MAX_MESSAGE_CHARS = 4096

_OPEN = b"\x96\x01"
_OPEN_RAW = b"\x97\x0e"
_LAST = b"\x93\x05"
_SINGLE = {False: b"\x93\x02", True: _LAST}
_FLAT = (bytes, str)
_BATCHED = {False: b"\x93\x03", True: b"\x93\x06"}


def raw_cost(size_bytes: int) -> int:
    """Return the credits that a raw payload of `size_bytes` costs."""
    return 1 + size_bytes // CREDIT_UNIT_BYTES


def payload_of(value: Any) -> bytes:
    """Pack a value as a payload; large `bytes` stay as they are. Raises TypeError."""
    if type(value) is bytes and len(value) > MAX_INLINE_BYTES:
        return value
    try:
        payload = pack_plain(value)
    except (TypeError, ValueError, OverflowError):
        payload = pack_with_care(value)
    if len(payload) > MAX_DEPTH and len(payload) <= MAX_INLINE_BYTES and type(value) not in _FLAT:
        check_depth(payload)
    return payload


def encoding_of(payload: bytes, value: Any) -> Encoding:
    """Return the encoding that `payload_of` chose for the value."""
    return Encoding.BINARY if payload is value else Encoding.MSGPACK


class Packed:
    """A request as it was sent. It can be sent again as the same bytes, even if the object has changed."""

    __slots__ = ("encoding", "headers", "payload")

    def __init__(self, payload: bytes, encoding: Encoding, headers: bytes) -> None:
        self.payload = payload
        self.encoding = encoding
        self.headers = headers

    def value(self) -> Any:
        """Unpack the request, as its worker does."""
        return self.payload if self.encoding is Encoding.BINARY else unpack(self.payload)


def encode_headers(headers: Headers | None) -> bytes:
    """Pack a request's headers. Raises TypeError or PayloadTooLarge."""
    packed = pack(headers)
    if len(packed) > MAX_HEADERS_BYTES:
        raise PayloadTooLarge(
            f"request headers of {len(packed)} bytes are over the limit of {MAX_HEADERS_BYTES}",
            size_bytes=len(packed),
            limit_bytes=MAX_HEADERS_BYTES,
        )
    return packed


def add_deadline(headers: bytes, deadline_ms: int) -> bytes:
    """Add `deadline_ms` to packed headers. It counts from the moment in which they are sent."""
    if headers == NO_HEADERS:
        headers = _EMPTY_MAP
    map_of_more = bytes((headers[0] + 1,))  # of a few entries, so their number is in its first byte
    return b"".join((map_of_more, headers[1:], _DEADLINE_KEY, pack_known(deadline_ms)))


def encode_route(subject: str, flags: int, headers: bytes) -> bytes:
    """Encode the middle of OPEN: subject, flags, packed headers."""
    return b"".join((pack_known(subject), pack_known(flags), headers))


@lru_cache(maxsize=1024)
def plain_route(subject: str) -> bytes:
    """Encode a route without flags and headers. The result is cached."""
    return encode_route(subject, 0, NO_HEADERS)


def encode_open(stream_id: int, route: bytes, payload: bytes) -> bytes:
    """Encode OPEN with a payload of at most `MAX_INLINE_BYTES`."""
    return b"".join((_OPEN, pack_known(stream_id), route, payload))


def encode_open_raw(stream_id: int, route: bytes, size_bytes: int, encoding: Encoding) -> bytes:
    """Encode OPEN_RAW; the payload follows it."""
    return b"".join(
        (_OPEN_RAW, pack_known(stream_id), route, pack_known(size_bytes), pack_known(int(encoding)))
    )


def encode_items(stream_id: int, items: list[bytes], *, last: bool) -> bytes:
    """Encode DATA, BATCH, LAST or LAST_BATCH of packed items (at least one)."""
    if len(items) == 1:
        return b"".join((_SINGLE[last], pack_known(stream_id), items[0]))
    return b"".join((_BATCHED[last], pack_known(stream_id), array_header(len(items)), *items))


def encode_last(stream_id: int, item: bytes) -> bytes:
    """Encode LAST of one packed item, as `encode_items` does, for answers of one item."""
    return b"".join((_LAST, pack_known(stream_id), item))


def encode_item_raw(stream_id: int, size_bytes: int, encoding: Encoding, *, last: bool) -> bytes:
    """Encode DATA_RAW or LAST_RAW; the payload follows it."""
    return pack_known((LAST_RAW if last else DATA_RAW, stream_id, size_bytes, int(encoding)))


def encode_end(stream_id: int) -> bytes:
    """Encode END."""
    return pack_known((END, stream_id))


def encode_error(stream_id: int, code: str, message: str, details: Mapping[str, Any] | None) -> bytes:
    """Encode ERROR. The message is cut to keep the frame small."""
    return pack_known((ERROR, stream_id, code, _text(message), details))


def encode_accept(stream_id: int) -> bytes:
    """Encode ACCEPT."""
    return pack_known((ACCEPT, stream_id))


def encode_credit(stream_id: int, count: int) -> bytes:
    """Encode CREDIT: the sender of this stream's items may send `count` more."""
    return pack_known((CREDIT, stream_id, count))


def encode_cancel(stream_id: int, strength: Strength) -> bytes:
    """Encode CANCEL."""
    return pack_known((CANCEL, stream_id, int(strength)))


def encode_goaway(code: str, message: str) -> bytes:
    """Encode GOAWAY. With code `draining` the connection stays for its present requests; else it closes
    now."""
    return pack_known((GOAWAY, 0, code, _text(message)))


def encode_ping(token: int) -> bytes:
    """Encode PING."""
    return pack_known((PING, 0, token))


def encode_pong(token: int) -> bytes:
    """Encode PONG with the PING's token."""
    return pack_known((PONG, 0, token))


def _text(message: str) -> str:
    """Cut a message to a length that fits, and replace characters that UTF-8 cannot carry."""
    return message[:_MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode()
