"""The ways in which callers reach instances, below the sessions of frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dynamo_redis.planes.base import Target
from dynamo_redis.planes.frames.client_connection import ClientConnection


class Carrier(Protocol):
    """Opens connections to instances. A client has one."""

    async def dial(
        self,
        target: Target,
        make: Callable[[], ClientConnection],
        on_made: Callable[[ClientConnection], None],
        give_up_at: float,
    ) -> ClientConnection:
        """Return a connection whose handshake is done. Cancelling closes the opened connection.

        Args:
            target: any endpoint of the instance.
            make: makes the connection's protocol.
            on_made: is called with the connection once bytes can go to the instance, before the handshake.
            give_up_at: the time limit, in the event loop's time.

        Raises CannotConnect, or the error that the instance refuses with: AuthenticationFailed, ….
        """
        ...

    async def ask_for_life(self, target: Target) -> bool:
        """Return True if the instance's process lives and its event loop is busy. Has no time-out of its
        own. Raises OSError or ValueError."""
        ...

    async def aclose(self) -> None:
        """Release what all connections share. Called once they are closed."""
        ...
