"""Types of the suites' options: what cannot be measured is refused before anything is started."""

from __future__ import annotations

import argparse
import math


def rounds_count(text: str) -> int:
    """How often to measure: once at least."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return count


def length_s(text: str) -> float:
    """How long to measure, in seconds: some time."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
