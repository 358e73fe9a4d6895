"""Sessions of frames between two parts of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_redis.errors import CannotConnect, ConnectionLost, ProtocolViolation
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.frames.client_connection import ClientConnection
from dynamo_redis.planes.frames.server_connection import ServerConnection
from dynamo_redis.planes.tunnel.pair import connect_pair


class LocalCarrier:
    """Implements `Carrier` to a server of this process."""

    def __init__(self, accept: Callable[[], ServerConnection]) -> None:
        """`accept` makes the server's side of a connection."""
        self._accept = accept

    async def dial(
        self,
        target: Target,
        make: Callable[[], ClientConnection],
        on_made: Callable[[ClientConnection], None],
        give_up_at: float,
    ) -> ClientConnection:
        """See `Carrier.dial`."""
        connection = make()
        try:
            async with asyncio.timeout_at(give_up_at):
                connect_pair(asyncio.get_running_loop(), connection, self._accept())
                on_made(connection)
                await connection.handshake_done
        except TimeoutError:
            connection.fail(ConnectionLost("the handshake was given up"))
            raise CannotConnect("this process is too busy to begin a request") from None
        except (ConnectionLost, ProtocolViolation) as exc:
            raise CannotConnect(str(exc)) from exc
        except asyncio.CancelledError:
            connection.fail(ConnectionLost("the handshake was given up"))
            raise
        return connection

    async def ask_for_life(self, target: Target) -> bool:
        """See `Carrier.ask_for_life`."""
        return False

    async def aclose(self) -> None:
        """See `Carrier.aclose`."""
