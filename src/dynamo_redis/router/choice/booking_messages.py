"""The messages in which routers tell each other of their bookings. Pure.

    ["add", request_id, instance_id, dp_rank, prefill_tokens, blocks, ttl_s, names]
    ["prefill_done", request_id]
    ["free", request_id]
    ["active", [[request_id, instance_id, dp_rank, prefill_tokens, blocks, ttl_s, names, shared], …]]

`blocks` counts all blocks of a prompt. `names` are the sequence hashes of the first of them, eight bytes
each, so that a block that several requests of a worker hold counts once. "active" messages have all bookings
of a router, in pieces; there `names` leaves out the first `shared` blocks, which are those of the booking
before it. A router of an older release neither sends nor reads `names`, and counts each block as the
request's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, Final, NamedTuple

from dynamo_redis.errors import InvalidRecord
from dynamo_redis.router.base import Worker
from dynamo_redis.router.choice.active_blocks import NAME_BYTES, common_end
from dynamo_redis.router.choice.booking import Booking

PIECE_COUNT: Final = 256
"""Bookings in one "active" message."""

PIECE_BYTES: Final = 64 << 10
"""A piece ends with the booking with which its names reach this size."""

MOST_NAMES_BYTES: Final = NAME_BYTES << 13
"""Most names of one booking: 8,192 blocks. Further blocks count as the request's own."""

_WHAT: Final = "a booking"


class RemoteBooking(NamedTuple):
    """A booking of another router. It counts for `left_s` from the time at which it was sent."""

    request_id: str
    worker: Worker
    prefill_tokens: int
    blocks: int
    left_s: float
    names: bytes


def add_message(booking: Booking, now: float) -> list[Any]:
    """Make the message that a request was booked."""
    return ["add", *_head(booking, now), booking.names[:MOST_NAMES_BYTES]]


def active_messages(bookings: Iterable[Booking], now: float) -> Iterator[list[Any]]:
    """Make the messages with all bookings of a router, sorted by names, so that equal beginnings are next to
    each other."""
    piece: list[Any] = []
    piece_bytes, before = 0, b""
    for booking in sorted(bookings, key=attrgetter("names")):
        names = booking.names[:MOST_NAMES_BYTES]
        shared = common_end(before, names, 0, min(len(before), len(names)))
        piece.append([*_head(booking, now), names[shared:], shared // NAME_BYTES])
        piece_bytes += len(names) - shared
        before = names
        if len(piece) == PIECE_COUNT or piece_bytes >= PIECE_BYTES:
            yield ["active", piece]
            piece, piece_bytes, before = [], 0, b""
    if piece:
        yield ["active", piece]


def _head(booking: Booking, now: float) -> list[Any]:
    """Return the fields of a booking before its names."""
    ttl_s = round(booking.deadline - now, 3)
    worker = booking.choice.worker
    return [booking.request_id, *worker, booking.prefill_tokens, booking.blocks, ttl_s]


def read_booking(described: Any, before: bytes = b"") -> RemoteBooking:
    """Read a booking; fields of later releases are ignored. `before` are the names of the booking before it.

    Raises InvalidRecord.
    """
    match described:
        case [
            str(request_id),
            int(instance_id),
            int(dp_rank),
            int(prefill_tokens),
            int(blocks),
            int() | float() as left_s,
            *more,
        ]:
            pass
        case _:
            raise InvalidRecord(_WHAT, "its fields are others")
    match more:
        case []:  # of an older release
            rest, shared = b"", 0
        case [bytes(rest)]:
            shared = 0
        case [bytes(rest), int(shared), *_] if 0 <= shared * NAME_BYTES <= len(before):
            pass
        case _:
            raise InvalidRecord(_WHAT, "the names of its blocks are no binary, or share more than there is")
    names = before[: shared * NAME_BYTES] + rest
    if len(names) % NAME_BYTES or len(names) > MOST_NAMES_BYTES:
        raise InvalidRecord(_WHAT, f"{len(names)} bytes of names")
    worker = Worker(instance_id, dp_rank)
    return RemoteBooking(request_id, worker, max(prefill_tokens, 0), max(blocks, 0), left_s, names)
