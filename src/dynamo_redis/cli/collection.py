"""Garbage collection during the start: imported modules stay, so a search for garbage among them is wasted.

Measured with the frontend's imports on Python 3.11: 0.50 s of CPU instead of 0.63 s. Once the modules are
frozen, later collections do not visit them.
"""

from __future__ import annotations

import gc


def suspend() -> None:
    """Stop garbage collection while the program loads."""
    gc.disable()


def resume() -> None:
    """Freeze all loaded objects, and collect garbage as usual from now on. Idempotent."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
