"""What suite `events` sends: both sides' processes import this, in whichever environment they run. Pure."""

from __future__ import annotations

from typing import Final

EVENT_BYTES: Final = 300
BATCH_COUNT: Final = 256
"""Events of a batch, on both sides: what a publisher of ours has by default."""

PULL_COUNT: Final = 1000
"""Messages that a JetStream consumer asks for at once."""

READ_COUNT: Final = 64
"""Entries that a reader of ours asks for at once, when they are batches."""

STREAM: Final = "bench"
SUBJECT: Final = "bench.events"


def event_bytes(number: int) -> bytes:
    """An event as it is on the wire: of `EVENT_BYTES`, each different."""
    return number.to_bytes(8, "big") * (EVENT_BYTES // 8) + bytes(EVENT_BYTES % 8)
