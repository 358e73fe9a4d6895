"""Writing under TLS: in pieces, and no faster than the peer reads.

A TLS transport, asyncio's and uvloop's, encrypts written bytes at once and hands them to the TCP transport
below, whose buffer it neither counts nor waits for. A large payload that is written in one piece goes there
whole: its connection seems to be free, so small requests queue behind it, and all its bytes seem to be sent.
Written piece by piece, at most `PACED_HIGH_WATER_BYTES` and a few pieces are below; the rest waits here,
where it is counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

PIECE_BYTES: Final = 64 * 1024
PACED_HIGH_WATER_BYTES: Final = 128 * 1024
"""Encrypted and unsent bytes past which a TLS transport pauses its writer."""


class PacedWriter:
    """Writes to one TLS transport. While it is `paused`, `held_bytes` wait here, in order."""

    __slots__ = ("_held", "_transport", "held_bytes", "paused")

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._held: deque[bytes | memoryview] = deque()
        self.held_bytes = 0
        self.paused = False
        """Set by the connection when the transport asks it to pause."""

    def write(self, *data: bytes) -> None:
        """Write until the transport pauses, and hold the rest."""
        self._held += data
        self.held_bytes += sum(map(len, data))
        self._write_held()

    def resume(self) -> None:
        """Continue to write: the transport has resumed."""
        self.paused = False
        self._write_held()

    def write_all(self) -> None:
        """Hand over the held bytes, before the transport is closed."""
        held, self._held = self._held, deque()
        self.held_bytes = 0
        for data in held:
            self._transport.write(data)

    def _write_held(self) -> None:
        """Write held bytes piece by piece until the transport pauses."""
        held = self._held
        while held and not self.paused:
            piece = held.popleft()
            if len(piece) > PIECE_BYTES:
                whole = memoryview(piece)
                held.appendleft(whole[PIECE_BYTES:])
                piece = whole[:PIECE_BYTES]
            self.held_bytes -= len(piece)
            self._transport.write(piece)
