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
"""Not as msgpack's own `Timestamp`: whoever likes makes thousands with one hash, and a map that has them as
keys would occupy the event loop for minutes."""

_FRAME_AND_BATCH = b"\x91\x91"


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, set | frozenset):
        return list(value)
    if isinstance(value, int):
        raise OverflowError("Integer value out of range")
    raise TypeError(f"can not serialize {type(value).__name__!r} object")


pack_known = msgpack.Packer(autoreset=True, default=_as_list).pack
"""`pack` for what is known to be msgpack, such as the parts of a frame that this side makes."""

pack_plain = msgpack.Packer(autoreset=True, strict_types=True).pack
"""`pack` for what is made of msgpack's own types. Raises TypeError for tuples and subclasses too."""

_depth_probes: list[msgpack.Unpacker] = []


def pack(value: Any) -> bytes:
    """`value` as msgpack. Raises TypeError if msgpack cannot carry it."""
    try:
        return pack_plain(value)
    except (TypeError, ValueError, OverflowError):
        return pack_with_care(value)


def pack_with_care(value: Any) -> bytes:
    """`pack` for what `pack_plain` does not take.

    A tuple may be the key of a dict here, and arrive as a list, which may not: within a frame that would cost
    the receiver the whole connection. So what fits into one is tried.
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
    """Refuse a packed value that no unpacker takes inside a frame. Raises TypeError.

    The packer nests one level deeper than the unpacker (1024), which sees the frame and its batch around
    the value: a value of such a depth would cost the receiver the whole connection.
    """
    probe = _depth_probes.pop() if _depth_probes else msgpack.Unpacker(max_buffer_size=2 * MAX_INLINE_BYTES)
    probe.feed(_FRAME_AND_BATCH)
    probe.feed(payload)
    try:
        probe.skip()
    except msgpack.StackError:
        raise TypeError(f"not a msgpack value: nested more than {MAX_DEPTH} deep") from None
    _depth_probes.append(probe)  # a new one costs as much as the check of 64 KiB


def unpack(payload: bytes | bytearray | memoryview) -> Any:
    """The one value in `payload`. Raises ValueError."""
    try:
        return msgpack.unpackb(payload, strict_map_key=False, timestamp=_TIMESTAMPS_AS_FLOATS)
    except (msgpack.UnpackException, TypeError, MemoryError) as exc:  # TypeError: a map with a map as key
        raise ValueError(f"not msgpack: {exc!r}") from exc


def new_payload_unpacker(size_bytes: int) -> msgpack.Unpacker:
    """A streaming unpacker for one value of `size_bytes`, with the limits of `unpack`."""
    return msgpack.Unpacker(max_buffer_size=size_bytes, strict_map_key=False, timestamp=_TIMESTAMPS_AS_FLOATS)


def new_unpacker() -> msgpack.Unpacker:
    """A streaming unpacker for frames. It holds about 45 KB, so connections share them.

    msgpack makes room for an array as soon as its head has come, so the limit of its length also bounds what
    nested heads without content can take: half a MiB a level of address space, of which some 55 KiB become
    memory. Half a frame can hold 55 MiB so, until its time is up.
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
