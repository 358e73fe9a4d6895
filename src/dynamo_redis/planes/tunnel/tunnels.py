"""The connections of one process through its link to the broker."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from functools import partial
from typing import Final

from dynamo_redis.errors import ProtocolViolation
from dynamo_redis.planes.tunnel.link import Link
from dynamo_redis.planes.tunnel.transport import TunnelTransport
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.wire import tunnel
from dynamo_redis.wire.tunnel import ID_BYTES, Kind, Message

CHECK_S: Final = 30.0
"""Pause between two messages on each connection that show whether its peer still receives."""

_log = logging.getLogger(__name__)


class Tunnels:
    """Implements `LinkOwner`: the connections that this process opened, or accepts from others."""

    def __init__(self, link: Link, accept: Callable[[], asyncio.BufferedProtocol] | None = None) -> None:
        """`accept` makes the protocol of a connection that a caller opens; None: none may."""
        self._link = link
        self._accept = accept
        self._open: dict[bytes, TunnelTransport] = {}
        self._check_timer: asyncio.TimerHandle | None = None
        self._complaints = RateLimitedLog(_log)
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        """Open the link. Raises CannotConnect or ConfigError, and may then be called again."""
        self._loop = asyncio.get_running_loop()
        await self._link.open(self)

    def connect(self, receiver: str, protocol: asyncio.BufferedProtocol) -> TunnelTransport:
        """Open a connection, without waiting: whether there is a peer shows later."""
        connection_id = secrets.token_bytes(ID_BYTES)
        self._link.send(receiver, connection_id, tunnel.encode_head(Kind.OPEN, connection_id, tunnel.VERSION))
        return self._add(receiver, connection_id, protocol)

    def stop_accepting(self) -> None:
        """Refuse connections of callers from now on."""
        self._accept = None

    async def aclose(self) -> None:
        """End the connections that are left, and the link. Idempotent."""
        for transport in tuple(self._open.values()):
            transport.abort()
        if self._check_timer is not None:
            self._check_timer.cancel()
        await self._link.aclose()

    def _add(self, peer: str, connection_id: bytes, protocol: asyncio.BufferedProtocol) -> TunnelTransport:
        send = partial(self._link.send, peer, connection_id)
        transport = TunnelTransport(
            self._loop,
            connection_id,
            protocol,
            content_bytes=self._link.content_bytes,
            send=send,
            on_end=lambda: self._open.pop(connection_id, None),
        )
        if not transport.is_closing():
            self._open[connection_id] = transport
        if self._check_timer is None:
            self._check_timer = self._loop.call_later(CHECK_S, self._check)
        return transport

    def _check(self) -> None:
        """Send a message on each connection: the broker tells, or the peer, if the connection has ended."""
        self._check_timer = None
        for transport in tuple(self._open.values()):
            transport.report()
        if self._open:
            self._check_timer = self._loop.call_later(CHECK_S, self._check)

    # ------------------------------------------------------------------- LinkOwner

    def on_message(self, message: bytes, sender: str) -> None:
        """See `LinkOwner.on_message`. A message that is none of a tunnel is counted in the log."""
        sender = sender if tunnel.is_address(sender) else ""
        try:
            self._handle(tunnel.decode(message), sender)
        except ProtocolViolation as exc:
            self._complaints.log("%s sent what is no message of this plane: %s", sender or "a process", exc)

    def _handle(self, received: Message, sender: str) -> None:
        transport = self._open.get(received.connection_id)
        if transport is not None:
            try:
                transport.on_message(received)
            except Exception as exc:  # noqa: BLE001 - as in asyncio, it ends this connection alone
                _log.exception("a message could not be handled")
                transport.end(exc)
        elif received.kind is Kind.OPEN and self._accept is not None and sender:
            if received.number == tunnel.VERSION:
                self._add(sender, received.connection_id, self._accept())
            else:
                self._complaints.log("%s speaks version %d of the tunnel", sender, received.number)
                self._refuse(sender, received.connection_id)
        elif received.kind not in (Kind.RESET, Kind.CLOSE) and sender:
            self._refuse(sender, received.connection_id)

    def _refuse(self, sender: str, connection_id: bytes) -> None:
        if not self._link.is_behind:  # else this process would hold an answer to each message of a flood
            self._link.send(sender, connection_id, tunnel.encode_head(Kind.RESET, connection_id, 0))

    def on_unreachable(self, connection_id: bytes, reason: str = "no process listens there") -> None:
        """See `LinkOwner.on_unreachable`."""
        transport = self._open.get(connection_id)
        if transport is not None:
            transport.end(ConnectionRefusedError(reason))

    def on_lost(self, reason: str) -> None:
        """See `LinkOwner.on_lost`."""
        for transport in tuple(self._open.values()):
            transport.end(ConnectionResetError(reason))
