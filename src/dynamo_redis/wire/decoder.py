"""Bytes to frames, incrementally: the receiving half of the wire.

The owner of a socket reads into `buffer()`, then calls `received(n)`. Reads go into a scratch buffer that all
connections of an event loop share, and are fed to a shared msgpack unpacker. A connection keeps an unpacker
of its own only while it holds a partial frame. The raw bytes of a large payload are read straight into their
destination. A large packed value is unpacked piece by piece as its bytes come: millions of objects take
seconds, and no single read may hold the event loop that long.

A frame that announced raw bytes comes out whole, with the value in place of its encoding, behind the size:
`[DATA_RAW, id, size, value]`. Where the value is over the limit or no msgpack, an `Unusable` stands in its
place: only the stream fails, not the connection.
"""

from __future__ import annotations

import sys
from functools import cache
from io import BytesIO
from typing import Any, Final

import msgpack

from dynamo_redis.errors import InvalidRequest, Overloaded, PayloadTooLarge, PlaneError, ProtocolViolation
from dynamo_redis.wire.budget import PayloadBudget, PayloadShare
from dynamo_redis.wire.codec import (
    MAX_FRAME_BYTES,
    READ_BYTES,
    new_payload_unpacker,
    new_unpacker,
    unpack,
)
from dynamo_redis.wire.frame import DATA_RAW, LAST_RAW, OPEN_RAW, Encoding

_RAW_LENGTH: Final = {OPEN_RAW: 7, DATA_RAW: 4, LAST_RAW: 4}
_ENCODINGS: Final = tuple(map(int, Encoding))
_MAX_ANNOUNCED_BYTES: Final = 2**32
_MAX_SPARE_COUNT: Final = 4
_NOWHERE: Final = -1

_FIRST_PIECE_BYTES: Final = 8 * 1024
"""Bytes of a read that are unpacked first. Raw bytes behind a large payload's header in the same piece are
copied once more, so the first piece is small."""

UNPACKED_AT_ONCE_BYTES: Final = 1 << 20
"""The largest packed value that is unpacked in one step, once all its bytes are here."""

_KEPT_BLOCK_BYTES: Final = 31 << 20

STEP_BYTES: Final = 16 * 1024
"""Bytes of an incomplete frame or payload that count as one step of progress."""


@cache
def keep_large_blocks() -> None:
    """Have malloc keep the memory of large payloads for later ones; once a process.

    glibc gives each block above a threshold back to the system at once, and raises the threshold (to 32 MiB
    at most) when such a block is freed. A process that has freed one large message handles the next ones
    twice as fast. This call frees a block that was never touched, so the threshold is high from the start.
    With another malloc it does nothing.
    """
    bytes(_KEPT_BLOCK_BYTES)


class Unusable:
    """Stands for a raw payload that the receiver did not accept; `error` is the reason."""

    __slots__ = ("error",)

    def __init__(self, error: PlaneError) -> None:
        self.error = error


class ReadBuffers:
    """The resources that the connections of one event loop share: the scratch buffer, idle unpackers, and a
    budget of bytes for large payloads."""

    __slots__ = ("_spare", "budget", "scratch")

    def __init__(self, max_payload_in_flight_bytes: int = sys.maxsize) -> None:
        self.budget = PayloadBudget(max_payload_in_flight_bytes)
        keep_large_blocks()
        self.scratch = memoryview(bytearray(READ_BYTES))
        self._spare: list[msgpack.Unpacker] = []

    def borrow_unpacker(self) -> msgpack.Unpacker:
        """Return an empty unpacker."""
        return self._spare.pop() if self._spare else new_unpacker()

    def return_unpacker(self, unpacker: msgpack.Unpacker) -> None:
        """Give back an empty unpacker."""
        if len(self._spare) < _MAX_SPARE_COUNT:
            self._spare.append(unpacker)


class _RawPayload:
    """The raw bytes behind a header frame, while they arrive.

    The kernel writes the bytes into a `bytes` object that no other code has seen yet (through BytesIO, which
    returns it without a copy), so a large binary value is written once. The system maps the memory of
    `bytes(n)` page by page as data comes: a size that is announced and never sent costs address space only.
    """

    __slots__ = ("_encoding", "_frame", "_sink", "_view", "received_bytes", "size_bytes")

    def __init__(self, frame: list[Any], size_bytes: int, encoding: int) -> None:
        self._frame = frame
        self._encoding = encoding
        self._sink = BytesIO(bytes(size_bytes))
        self._view = self._sink.getbuffer()
        self.size_bytes = size_bytes
        self.received_bytes = 0

    @property
    def stream_id(self) -> int:
        """The stream id in the header; 0 if it is no integer."""
        stream_id = self._frame[1]
        return stream_id if type(stream_id) is int else 0

    def buffer(self) -> memoryview:
        """Return the place of the missing bytes."""
        return self._view[self.received_bytes :]

    def received(self, count: int) -> None:
        """Take the `count` bytes that were read into `buffer()`."""
        self.received_bytes += count

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Copy in bytes that were read elsewhere."""
        end = self.received_bytes + len(data)
        self._view[self.received_bytes : end] = data
        self.received_bytes = end

    def release(self) -> None:
        """Release the view of the destination. Python 3.13 complains about a BytesIO dropped while
        exported."""
        self._view.release()

    def finish(self) -> list[Any]:
        """Return the whole frame, with the value or an `Unusable`."""
        self.release()
        payload: Any = self._sink.getvalue()
        if self._encoding != Encoding.BINARY:
            try:
                payload = unpack(payload)
            except (ValueError, RecursionError, MemoryError) as exc:
                payload = Unusable(InvalidRequest(f"a payload of {self.size_bytes} bytes is broken: {exc}"))
        return [*self._frame, payload]


class _PackedPayload:
    """As `_RawPayload`, for a packed value that is unpacked while its bytes arrive.

    An unpacker that runs out of data keeps the objects that it has made, and continues with the next bytes.
    """

    __slots__ = (
        "_error",
        "_frame",
        "_scratch",
        "_unpacked_bytes",
        "_unpacker",
        "_value",
        "received_bytes",
        "size_bytes",
    )

    def __init__(self, frame: list[Any], size_bytes: int, scratch: memoryview) -> None:
        self._frame = frame
        self._scratch = scratch
        self._unpacker: msgpack.Unpacker | None = new_payload_unpacker(size_bytes)
        self._unpacked_bytes = 0
        self._value: Any = None
        self._error: Exception | None = None
        self.size_bytes = size_bytes
        self.received_bytes = 0

    @property
    def stream_id(self) -> int:
        """See `_RawPayload.stream_id`."""
        stream_id = self._frame[1]
        return stream_id if type(stream_id) is int else 0

    def buffer(self) -> memoryview:
        """Return the place of the next bytes; take them before anything else is read."""
        return self._scratch[: self.size_bytes - self.received_bytes]

    def received(self, count: int) -> None:
        """Take the `count` bytes that were read into `buffer()`."""
        self.append(self._scratch[:count])

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Unpack the next bytes."""
        self.received_bytes += len(data)
        unpacker = self._unpacker
        if unpacker is None or not data:
            return
        try:
            unpacker.feed(data)
            self._value = unpacker.unpack()
        except msgpack.OutOfData:
            return
        except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as exc:
            self._error = exc
        else:
            self._unpacked_bytes = unpacker.tell()
        self._unpacker = None

    def release(self) -> None:
        """Drop the values that have been made."""
        self._unpacker = None

    def finish(self) -> list[Any]:
        """Return the whole frame, with the value or an `Unusable`."""
        self.release()
        if self._error is None and self._unpacked_bytes == self.size_bytes:
            return [*self._frame, self._value]
        if self._error is not None:
            reason = repr(self._error)
        else:
            reason = (
                f"its value has {self._unpacked_bytes} bytes"
                if self._unpacked_bytes
                else "its value does not end"
            )
        broken = f"a payload of {self.size_bytes} bytes is broken: not msgpack: {reason}"
        return [*self._frame, Unusable(InvalidRequest(broken))]


class FrameDecoder:
    """The incoming side of one connection.

    `error` is set once the peer has sent bytes that are no frame; nothing is decoded after them. The frames
    that came before are still returned.
    """

    __slots__ = (
        "_buffers",
        "_end",
        "_max_payload_bytes",
        "_raw",
        "_skip_bytes",
        "_start",
        "_unfinished_count",
        "_unpacker",
        "error",
        "share",
    )

    def __init__(self, buffers: ReadBuffers, max_payload_bytes: int) -> None:
        self._buffers = buffers
        self.share = PayloadShare(buffers.budget)
        self._max_payload_bytes = max_payload_bytes
        self._unpacker: msgpack.Unpacker | None = None
        self._start = 0  # where the partial frame begins in the unpacker's stream
        self._end = 0  # where the bytes fed to it end
        self._raw: _RawPayload | _PackedPayload | None = None
        self._skip_bytes = 0
        self._unfinished_count = 0
        self.error: ProtocolViolation | None = None

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """The number of the incomplete frame and the steps of `STEP_BYTES` that have come; None between
        frames.

        Two equal values at two moments mean that no step was made in between.
        """
        if self._unpacker is not None:
            return self._unfinished_count, (self._end - self._start) // STEP_BYTES
        if self._raw is not None:
            return self._unfinished_count, self._raw.received_bytes // STEP_BYTES
        return (self._unfinished_count, self._skip_bytes // STEP_BYTES) if self._skip_bytes else None

    @property
    def is_between_frames(self) -> bool:
        """True if the input so far ends with a whole frame."""
        return self._unpacker is None and self._raw is None and not self._skip_bytes

    @property
    def in_raw_payload(self) -> bool:
        """True while the rest of a large payload is still to come."""
        return self._raw is not None or self._skip_bytes > 0

    @property
    def missing_bytes(self) -> int:
        """Bytes of a large payload that are still to come."""
        raw = self._raw
        return self._skip_bytes if raw is None else raw.size_bytes - raw.received_bytes

    @property
    def raw_stream_id(self) -> int:
        """The stream id of the incomplete large payload; 0 without one, or where its bytes are skipped."""
        return 0 if self._raw is None else self._raw.stream_id

    def buffer(self) -> memoryview:
        """Return the place of the next read."""
        return self._buffers.scratch if self._raw is None else self._raw.buffer()

    def received(self, count: int) -> list[list[Any]]:
        """Return the frames that the `count` bytes read into `buffer()` complete, in order."""
        raw = self._raw
        if raw is None:
            return self.feed(self._buffers.scratch[:count])
        raw.received(count)
        if raw.received_bytes < raw.size_bytes:
            return []
        self._raw = None
        return [self._finish_raw(raw)]

    def feed(self, data: memoryview) -> list[list[Any]]:
        """Return the frames that `data` completes, in order."""
        frames: list[list[Any]] = []
        piece_bytes = _FIRST_PIECE_BYTES
        try:
            while data and self.error is None:
                if self._raw is not None or self._skip_bytes:
                    data = self._feed_raw(data, frames)
                else:
                    self._feed_frames(data[:piece_bytes], frames)
                    data = data[piece_bytes:]
                    piece_bytes *= 2
        except ProtocolViolation as exc:
            self._fail(exc)
        except (ValueError, TypeError, MemoryError, msgpack.UnpackException) as exc:
            self._fail(ProtocolViolation(f"not a frame: {exc!r}"))
        return frames

    def close(self) -> None:
        """Drop an incomplete frame or payload."""
        self._unpacker = None  # it holds a partial frame: not to be shared again
        if self._raw is not None:
            self._raw.release()
            self.share.release(self._raw.size_bytes)
            self._raw = None

    def _fail(self, error: ProtocolViolation) -> None:
        self.error = error
        self.close()

    def _feed_raw(self, data: memoryview, frames: list[list[Any]]) -> memoryview:
        """Take the bytes that belong to a raw payload; return the rest."""
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(data))
            self._skip_bytes -= skipped
            return data[skipped:]
        raw = self._raw
        assert raw is not None
        wanted = raw.size_bytes - raw.received_bytes
        raw.append(data[:wanted])
        if raw.received_bytes == raw.size_bytes:
            self._raw = None
            frames.append(self._finish_raw(raw))
        return data[wanted:]

    def _feed_frames(self, data: memoryview, frames: list[list[Any]]) -> None:
        """Unpack the frames in `data`, with the raw payloads that begin in it."""
        unpacker = self._unpacker
        if unpacker is None:
            unpacker = self._unpacker = self._buffers.borrow_unpacker()
            self._start = _NOWHERE
            offset = self._end = unpacker.tell()
        else:
            offset = self._start
        unpacker.feed(data)
        self._end = end = self._end + len(data)
        unpack_one, tell = unpacker.unpack, unpacker.tell
        may_be_too_long = end - offset > MAX_FRAME_BYTES
        try:
            while offset != end:
                frame = unpack_one()
                if may_be_too_long:
                    _check_length(tell() - offset)
                offset = tell()
                if type(frame) is not list or len(frame) < 2:
                    raise ProtocolViolation("a frame is an array of a type, a stream id, and more")
                if frame[0] in _RAW_LENGTH:
                    self._begin_raw(frame, unpacker, frames)
                    offset = tell()
                else:
                    frames.append(frame)
        except msgpack.OutOfData:
            _check_length(end - offset)
            if offset != self._start:  # another frame than the one that was incomplete before
                self._start = offset
                self._unfinished_count += 1
            return
        self._unpacker = None
        self._buffers.return_unpacker(unpacker)

    def _begin_raw(self, header: list[Any], unpacker: msgpack.Unpacker, frames: list[list[Any]]) -> None:
        """Begin the raw payload of a header frame, with the bytes that are here already."""
        kind, size_bytes, encoding = header[0], header[-2], header[-1]
        if len(header) != _RAW_LENGTH[kind] or type(size_bytes) is not int or encoding not in _ENCODINGS:
            raise ProtocolViolation("a malformed header of a raw payload")
        if not 0 <= size_bytes < _MAX_ANNOUNCED_BYTES:
            raise ProtocolViolation(f"a raw payload of {size_bytes} bytes was announced")
        frame = header[:-1]
        error = self._refusal(size_bytes)
        if error is not None:
            frames.append([*frame, Unusable(error)])
            self._unfinished_count += 1
            self._skip_bytes = size_bytes - len(unpacker.read_bytes(size_bytes))
            return
        raw: _RawPayload | _PackedPayload
        if encoding == Encoding.MSGPACK and size_bytes > UNPACKED_AT_ONCE_BYTES:
            raw = _PackedPayload(frame, size_bytes, self._buffers.scratch)
        else:
            raw = _RawPayload(frame, size_bytes, encoding)
        self._unfinished_count += 1
        raw.append(unpacker.read_bytes(size_bytes))
        if raw.received_bytes == size_bytes:
            frames.append(self._finish_raw(raw))
        else:
            self._raw = raw

    def _refusal(self, size_bytes: int) -> PlaneError | None:
        """Reserve room for a payload. Return the error if it is not accepted, else None."""
        if size_bytes > self._max_payload_bytes:
            return PayloadTooLarge(size_bytes=size_bytes, limit_bytes=self._max_payload_bytes)
        if self.share.try_reserve(size_bytes):
            return None
        held_bytes = self._buffers.budget.held_bytes
        return Overloaded(
            f"no room for a payload of {size_bytes} bytes beside the {held_bytes} that are held "
            "(DYN_TCP_MAX_PAYLOAD_BYTES_IN_FLIGHT)"
        )

    def _finish_raw(self, raw: _RawPayload | _PackedPayload) -> list[Any]:
        """Return the whole frame. Its size is released here; the payload's next owner reserves it again."""
        self.share.release(raw.size_bytes)
        return raw.finish()


def _check_length(frame_bytes: int) -> None:
    """Raise ProtocolViolation for a frame over the limit."""
    if frame_bytes > MAX_FRAME_BYTES:
        raise ProtocolViolation(f"a frame is over the limit of {MAX_FRAME_BYTES} bytes")
