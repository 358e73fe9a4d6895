"""Limits of one HTTP connection, and the amount of it that is read ahead."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from uvicorn.protocols.http.flow_control import FlowControl

from dynamo_redis.frontend.http.door import Guest

MOST_UNPARSED_BYTES = 64 * 1024
"""Past so much that is not parsed no more is read."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one connection, and the connections that may have to make room for others."""

    receive_timeout_s: float = 60.0
    """From the first byte of a request to its last."""
    send_timeout_s: float = 60.0
    """For which a client may take nothing of its answer."""
    waiting: dict[Guest, None] = field(default_factory=dict)
    """The connections without a whole request, the longest first."""


class Flow(FlowControl):
    """Reads no more while much waits to be parsed."""

    def __init__(self, transport: asyncio.Transport, unparsed: bytearray) -> None:
        super().__init__(transport)
        self._unparsed = unparsed

    def resume_reading(self) -> None:
        """Read on, if what has come was parsed."""
        if len(self._unparsed) <= MOST_UNPARSED_BYTES:
            super().resume_reading()
