"""msgpack, as this protocol uses it: one packer, and unpackers that refuse before they allocate.

Every value on the wire is msgpack (https://github.com/msgpack/msgpack/blob/master/spec.md). Strings are
UTF-8, tuples arrive as lists, timestamps as seconds since 1970, map keys may be of any scalar type.
"""

from __future__ import annotations

from typing import Any

import msgpack

MAX_INLINE_BYTES = 64 * 1024
"""The largest payload inside a frame. A larger one follows its header frame as raw bytes."""

MAX_FRAME_BYTES = 128 * 1024
"""The largest frame: a payload or a batch, the request's headers, and room to spare."""

MAX_HEADERS_BYTES = 32 * 1024
"""The largest headers of one request: request id, trace context and metadata, packed."""

READ_BYTES = 64 * 1024
"""The size of the shared read buffer: the most that one read can bring."""

MAX_DEPTH = 1022
"""How deep a value may nest: msgpack's own limit, less the frame and the batch around it."""

_TIMESTAMPS_AS_FLOATS = 1
"""Not as msgpack's own `Timestamp`: a peer can make thousands of them with one hash, and a map with such keys
would occupy the event loop for minutes."""

_FRAME_AND_BATCH = b"\x91\x91"


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, set | frozenset):
        return list(value)
    if isinstance(value, int):
        raise OverflowError("Integer value out of range")
    raise TypeError(f"can not serialize {type(value).__name__!r} object")


pack_known = msgpack.Packer(autoreset=True, default=_as_list).pack
"""`pack` for values that msgpack is known to carry, such as the parts of a frame that this side makes."""

pack_plain = msgpack.Packer(autoreset=True, strict_types=True).pack
"""`pack` for values of msgpack's own types only. Raises TypeError for tuples and subclasses too."""

_depth_probes: list[msgpack.Unpacker] = []


def pack(value: Any) -> bytes:
    """Return `value` as msgpack. Raises TypeError if msgpack cannot carry it."""
    try:
        return pack_plain(value)
    except (TypeError, ValueError, OverflowError):
        return pack_with_care(value)


def pack_with_care(value: Any) -> bytes:
    """Pack a value that `pack_plain` refuses. Raises TypeError if msgpack cannot carry it.

    A tuple may be the key of a dict here. It arrives as a list, which may not be a key: inside a frame that
    would end the receiver's whole connection. So a payload that fits into a frame is unpacked once to check.
    """
    try:
        payload = pack_known(value)
    except (ValueError, OverflowError) as exc:
        raise TypeError(f"not a msgpack value: {exc}") from exc
    if len(payload) <= MAX_INLINE_BYTES:
        try:
            msgpack.unpackb(payload, strict_map_key=False)
        except TypeError as exc:
            raise TypeError("not a msgpack value: a map has a tuple as key, which arrives as a list") from exc
        except (ValueError, msgpack.UnpackException):  # too deep: see `check_depth`
            pass
    return payload


def check_depth(payload: bytes) -> None:
    """Raise TypeError for a packed value that nests too deep for the unpacker inside a frame.

    The packer nests one level deeper than the unpacker (1024 levels), and the unpacker also counts the frame
    and the batch around the value. A value of such a depth would end the receiver's whole connection.
    """
    probe = _depth_probes.pop() if _depth_probes else msgpack.Unpacker(max_buffer_size=2 * MAX_INLINE_BYTES)
    probe.feed(_FRAME_AND_BATCH)
    probe.feed(payload)
    try:
        probe.skip()
    except msgpack.StackError:
        raise TypeError(f"not a msgpack value: nested more than {MAX_DEPTH} deep") from None
    _depth_probes.append(probe)  # a new one costs as much as the check of 64 KiB


def array_header(count: int) -> bytes:
    """Return msgpack's header of an array of `count` elements."""
    if count < 16:
        return bytes((0x90 | count,))
    if count < 1 << 16:
        return b"\xdc" + count.to_bytes(2, "big")
    return b"\xdd" + count.to_bytes(4, "big")


def unpack(payload: bytes | bytearray | memoryview) -> Any:
    """Return the one value in `payload`. Raises ValueError."""
    try:
        return msgpack.unpackb(payload, strict_map_key=False, timestamp=_TIMESTAMPS_AS_FLOATS)
    except (msgpack.UnpackException, TypeError, MemoryError) as exc:  # TypeError: a map with a map as key
        raise ValueError(f"not msgpack: {exc!r}") from exc


def new_payload_unpacker(size_bytes: int) -> msgpack.Unpacker:
    """Make a streaming unpacker for one value of `size_bytes`, with the limits of `unpack`."""
    return msgpack.Unpacker(max_buffer_size=size_bytes, strict_map_key=False, timestamp=_TIMESTAMPS_AS_FLOATS)


def new_unpacker() -> msgpack.Unpacker:
    """Make a streaming unpacker for frames. It holds about 45 KB, so connections share them.

    msgpack allocates an array when its head has come. So the limit of an array's length also bounds the cost
    of nested heads without content: half a MiB of address space a level, some 55 KiB of it in memory. An
    incomplete frame can hold 55 MiB this way, until the connection gives up on it.
    """
    return msgpack.Unpacker(
        max_buffer_size=MAX_FRAME_BYTES + 2 * READ_BYTES,
        strict_map_key=False,
        timestamp=_TIMESTAMPS_AS_FLOATS,
        max_str_len=MAX_FRAME_BYTES,
        max_bin_len=MAX_FRAME_BYTES,
        max_array_len=MAX_INLINE_BYTES,  # one byte an element, in a payload or a batch
        max_map_len=MAX_FRAME_BYTES // 2,
        max_ext_len=MAX_FRAME_BYTES,
    )
