"""Messages of a tunnel: the bytes of one connection, carried by a broker in numbered messages. Pure.

Each message has a head of fixed length, and for DATA a part of the bytes behind it:

    kind u8 | connection 16 bytes | number u64, big-endian | bytes

    OPEN    number: the version of this format       the caller begins a connection, with a random id
    DATA    number: counts this side's DATA from 0   the next bytes
    TAKEN   number: bytes                            the count of bytes that this side has taken so far
    CLOSE   number: of the next DATA, if there were  no more bytes follow
    RESET   number: 0                                the connection has ended; also the answer to a message
                                                     of an unknown connection

Brokers keep the order of one sender's messages, but may lose some. The numbers show it. A side may have sent
at most `WINDOW_BYTES` that the other has not taken.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from typing import Final, NamedTuple

from dynamo_redis.errors import ProtocolViolation

VERSION: Final = 1
ID_BYTES: Final = 16
WINDOW_BYTES: Final = 1 << 20

_HEAD: Final = struct.Struct(f">B{ID_BYTES}sQ")
HEAD_BYTES: Final = _HEAD.size


_ADDRESS: Final = re.compile(r"[\w%-]+(\.[\w%-]+)*", re.ASCII)
_SPECIAL: Final = re.compile(r"[^A-Za-z0-9_-]")


def is_address(text: str) -> bool:
    """Return whether a text can be the address of a process: parts of letters, digits, `_`, `-`, `%`."""
    return _ADDRESS.fullmatch(text) is not None


def encode_part(text: str) -> str:
    """Return a text as one part of an address, percent-encoded."""
    return _SPECIAL.sub(lambda found: "".join(f"%{byte:02x}" for byte in found[0].encode()), text)


class Kind(IntEnum):
    """The kind of a message."""

    OPEN = 1
    DATA = 2
    TAKEN = 3
    CLOSE = 4
    RESET = 5


class Message(NamedTuple):
    """A message that was received."""

    kind: Kind
    connection_id: bytes
    number: int
    content: memoryview


_KINDS: Final = {int(kind): kind for kind in Kind}


def encode_head(kind: Kind, connection_id: bytes, number: int) -> bytes:
    """Encode the head of a message; the content of DATA follows it."""
    return _HEAD.pack(kind, connection_id, number)


def decode(message: bytes) -> Message:
    """Decode a message. Raises ProtocolViolation."""
    if len(message) < HEAD_BYTES:
        raise ProtocolViolation("a message of the tunnel is too short")
    kind, connection_id, number = _HEAD.unpack_from(message)
    known = _KINDS.get(kind)
    if known is None:
        raise ProtocolViolation(f"a message of the tunnel has the unknown kind {kind}")
    return Message(known, connection_id, number, memoryview(message)[HEAD_BYTES:])
