"""Vectors as base64 of little-endian float32, OpenAI's `encoding_format` `base64`. Pure."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence


def pack(vector: Sequence[float]) -> str:
    """Return a vector as base64. Raises TypeError for other values than numbers, OverflowError for numbers
    beyond float32."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def unpack(text: str) -> list[float]:
    """Return the vector of a base64 text. Raises ValueError."""
    numbers = array("f")
    numbers.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
