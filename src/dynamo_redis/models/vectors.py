"""Vectors as base64 of little-endian float32, OpenAI's `encoding_format` `base64`. Pure."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Iterable, Sequence


def pack(vector: Sequence[float]) -> str:
    """Return a vector as base64. Raises TypeError for other values than numbers, ValueError for NaN, infinity
    and numbers beyond float32."""
    numbers = array("f", vector)
    if not are_finite(numbers):
        raise ValueError("it has NaN, infinity or a number beyond float32")
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def are_finite(numbers: Iterable[float]) -> bool:
    """Return whether no number is NaN or infinity."""
    return all(map(math.isfinite, numbers))


def unpack(text: str) -> list[float]:
    """Return the vector of a base64 text. Raises ValueError."""
    numbers = array("f")
    numbers.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
