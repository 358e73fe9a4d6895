"""The events and sizes of suite `events`. Pure: the processes of both sides import it, each in its own
environment."""

from __future__ import annotations

from typing import Final

EVENT_BYTES: Final = 300
BATCH_COUNT: Final = 256
"""Events of a batch on both sides: the default of our publisher."""

PULL_COUNT: Final = 1000
"""Messages that a JetStream consumer requests at once."""

READ_COUNT: Final = 64
"""Entries that our reader requests at once when entries are batches."""

STREAM: Final = "bench"
SUBJECT: Final = "bench.events"


def event_bytes(number: int) -> bytes:
    """Return an event as it is on the wire: `EVENT_BYTES` long, and different for each number."""
    return number.to_bytes(8, "big") * (EVENT_BYTES // 8) + bytes(EVENT_BYTES % 8)
