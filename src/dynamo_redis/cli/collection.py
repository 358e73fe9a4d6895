"""Garbage collection around the start: what is imported stays, so looking for garbage among it is lost time.

Measured with the frontend's imports on Python 3.11: 0.50 s of CPU instead of 0.63 s. And once they are
frozen, no later collection walks through them.
"""

from __future__ import annotations

import gc


def suspend() -> None:
    """Collect nothing while the program loads."""
    gc.disable()


def resume() -> None:
    """Set aside all that is loaded, and collect as usual from now on. Idempotent."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
