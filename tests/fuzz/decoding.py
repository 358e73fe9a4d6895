"""Any bytes, split anywhere: the decoder returns the same frames and errors as the reference."""

from __future__ import annotations

from typing import Any

from hypothesis import event, given, target

from dynamo_redis.errors import PayloadTooLarge
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.decoder import FrameDecoder, ReadBuffers, Unusable
from tests.fuzz import reference
from tests.fuzz.rounds import Property
from tests.fuzz.streams import MAX_PAYLOAD_BYTES, Edit, Piece, assemble, edits, pieces, splits


def check(data: bytes, sizes: list[int]) -> reference.Decoded:
    """Decode `data` in reads of the given sizes and the rest. Raises AssertionError."""
    expected = reference.decode(data, MAX_PAYLOAD_BYTES)
    decoder = FrameDecoder(ReadBuffers(), MAX_PAYLOAD_BYTES)
    try:
        frames = read(decoder, data, sizes)
        assert [plain(one) for one in frames] == [pack(one) for one in expected.frames]
        assert (decoder.error is not None) == expected.violation, decoder.error
        if not expected.violation:
            assert decoder.is_between_frames == expected.between_frames
    finally:
        decoder.close()
    return expected


def read(decoder: FrameDecoder, data: bytes, sizes: list[int]) -> list[list[Any]]:
    """Have the decoder read `data` as from a socket, in reads of `sizes` bytes, then of any size."""
    frames: list[list[Any]] = []
    offset = 0
    for size in [*sizes, len(data)]:
        while size and offset < len(data) and decoder.error is None:
            room = decoder.buffer()
            count = min(size, len(room), len(data) - offset)
            room[:count] = data[offset : offset + count]
            frames += decoder.received(count)
            offset, size = offset + count, size - count
    return frames


def plain(decoded: list[Any]) -> bytes:
    """Pack a frame to compare it, with the reference's words in place of an unusable payload."""
    last = decoded[-1]
    if isinstance(last, Unusable):
        last = "too large" if isinstance(last.error, PayloadTooLarge) else "no msgpack"
    return pack([*decoded[:-1], last])


def decoder_property() -> Property:
    """Make the property: the decoder, fed any bytes in any pieces, equals the reference on the whole."""

    @given(pieces, edits, splits)
    def property_of_decoder(parts: list[Piece], damage: list[Edit], sizes: list[int]) -> None:
        expected = check(assemble(parts, damage), sizes)
        event(f"violation: {expected.violation}, between frames: {expected.between_frames}")
        target(float(len(expected.frames)), label="frames")

    return property_of_decoder
