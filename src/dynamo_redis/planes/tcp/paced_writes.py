"""Writing under TLS: in pieces, and no faster than the peer reads.

A TLS transport, asyncio's as uvloop's, encrypts what it is given at once and hands it to the TCP transport
below, whose buffer it neither counts nor waits for. A large payload that is written in one piece is all
there: its connection seems to be free, so small requests line up behind it, and its owner seems to have
nothing left to send. Written piece by piece, `PACED_HIGH_WATER_BYTES` and a few pieces are below at most, and
the rest is here, where it is counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

PIECE_BYTES: Final = 64 * 1024
PACED_HIGH_WATER_BYTES: Final = 128 * 1024
"""Encrypted and unsent bytes past which a TLS transport pauses its writer."""


class PacedWriter:
    """Writes to one TLS transport. `held_bytes` wait here, in order, as long as it is `paused`."""

    __slots__ = ("_held", "_transport", "held_bytes", "paused")

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._held: deque[bytes | memoryview] = deque()
        self.held_bytes = 0
        self.paused = False
        """Set by the connection when the transport asks it to pause."""

    def write(self, *data: bytes) -> None:
        """Write as much as the transport takes, and hold the rest."""
        self._held += data
        self.held_bytes += sum(map(len, data))
        self._write_held()

    def go_on(self) -> None:
        """Write on: the transport takes more."""
        self.paused = False
        self._write_held()

    def write_all(self) -> None:
        """Hand over the rest, before the transport is closed."""
        held, self._held = self._held, deque()
        self.held_bytes = 0
        for data in held:
            self._transport.write(data)

    def _write_held(self) -> None:
        held = self._held
        while held and not self.paused:
            piece = held.popleft()
            if len(piece) > PIECE_BYTES:
                whole = memoryview(piece)
                held.appendleft(whole[PIECE_BYTES:])
                piece = whole[:PIECE_BYTES]
            self.held_bytes -= len(piece)
            self._transport.write(piece)
