"""Types of the suites' options. A value that cannot be measured is refused before anything starts."""

from __future__ import annotations

import argparse
import math


def rounds_count(text: str) -> int:
    """Return the number of rounds, at least 1. Raises ArgumentTypeError."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return count


def length_s(text: str) -> float:
    """Return the length of a measurement in seconds, above 0. Raises ArgumentTypeError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
