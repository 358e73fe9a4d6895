"""A process's link to the broker that carries its tunnels."""

from __future__ import annotations

from typing import Final, Protocol

from dynamo_redis.planes.base import Describe

BEHIND_COUNT: Final = 1000
"""Messages that wait to be sent, from which on a link is behind."""


class LinkOwner(Protocol):
    """Receives what a link brings. Called on the event loop; must not raise."""

    def on_message(self, message: bytes, sender: str) -> None:
        """Handle a message of `sender`, an address that answers reach."""
        ...

    def on_unreachable(self, connection_id: bytes, reason: str = "no process listens there") -> None:
        """Handle a connection whose messages do not reach their receiver."""
        ...

    def on_lost(self, reason: str) -> None:
        """Handle that messages may have been lost: the broker was away."""
        ...


class Link(Protocol):
    """Sends messages to addresses, and receives those to its own. It connects again by itself."""

    @property
    def address(self) -> str:
        """The address that other links reach this one by."""
        ...

    @property
    def content_bytes(self) -> int:
        """The most bytes of content that one message may have."""
        ...

    async def open(self, owner: LinkOwner) -> None:
        """Connect, and receive from now on. Raises CannotConnect or ConfigError, and may then be called
        again. Has no effect once it is open."""
        ...

    def send(self, receiver: str, connection_id: bytes, message: bytes) -> None:
        """Send a message, without waiting, behind those sent before. It is dropped while the broker is
        away: `on_lost` tells."""
        ...

    @property
    def is_behind(self) -> bool:
        """True while so many messages wait to be sent that only those of connections should follow."""
        ...

    async def announce(self, describe: Describe) -> None:
        """See `RequestPlaneServer.announce`. Raises CannotConnect."""
        ...

    async def aclose(self) -> None:
        """Send what is left, for a moment at most, and end. Idempotent."""
        ...
