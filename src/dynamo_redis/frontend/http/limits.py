"""Limits of one HTTP connection, and a bound on the bytes that are read ahead."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from uvicorn.protocols.http.flow_control import FlowControl

from dynamo_redis.frontend.http.acceptor import Evictable

MOST_UNPARSED_BYTES = 64 * 1024
"""Reading pauses while more than this is received and not yet parsed."""


@dataclass(slots=True)
class HttpLimits:
    """Limits of each connection, and what all connections of a server share."""

    receive_timeout_s: float = 60.0
    """Longest time from the first byte of a request to its last."""
    send_timeout_s: float = 60.0
    """Longest time that a client may read nothing of its response."""
    overload_status: int = 503
    """HTTP status of a request that finds no room."""
    waiting: dict[Evictable, None] = field(default_factory=dict)
    """The connections without a whole request, the longest-waiting first. They may be closed in favour of new
    ones."""
    is_draining: bool = False
    """True once the server ends: each connection ends with its next answer."""


class Flow(FlowControl):
    """Flow control that also pauses reading while over `MOST_UNPARSED_BYTES` are not yet parsed."""

    def __init__(self, transport: asyncio.Transport, unparsed: bytearray) -> None:
        super().__init__(transport)
        self._unparsed = unparsed

    def resume_reading(self) -> None:
        """Read on, unless too many bytes are still to be parsed."""
        if len(self._unparsed) <= MOST_UNPARSED_BYTES:
            super().resume_reading()
