"""The way of callers to instances through the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_redis.errors import CannotConnect, ConfigError, ConnectionLost, ProtocolViolation
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.frames.client_connection import ClientConnection
from dynamo_redis.planes.tunnel.link import Link
from dynamo_redis.planes.tunnel.tunnels import Tunnels
from dynamo_redis.wire.tunnel import is_address


class TunnelCarrier:
    """Implements `Carrier`. The link opens with the first dial."""

    def __init__(self, link: Link) -> None:
        self._tunnels = Tunnels(link)
        self._starting = asyncio.Lock()

    async def dial(
        self,
        target: Target,
        make: Callable[[], ClientConnection],
        on_made: Callable[[ClientConnection], None],
        give_up_at: float,
    ) -> ClientConnection:
        """See `Carrier.dial`."""
        if not is_address(target.address):
            raise CannotConnect(f"{target.address!a} is no address of this plane")
        connection: ClientConnection | None = None
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(give_up_at):
                async with self._starting:
                    await self._tunnels.start()
                connection = make()
                self._tunnels.connect(target.address, connection)
                on_made(connection)
                await connection.handshake_done
        except TimeoutError:
            _abandon(connection)
            waited_s = asyncio.get_running_loop().time() - began
            raise CannotConnect(f"no answer from {target.address} in {waited_s:.1f} s") from None
        except (ConnectionLost, ProtocolViolation, ConfigError) as exc:
            _abandon(connection)
            raise CannotConnect(f"cannot connect to {target.address}: {exc}") from exc
        except asyncio.CancelledError:
            _abandon(connection)
            raise
        return connection

    async def ask_for_life(self, target: Target) -> bool:
        """See `Carrier.ask_for_life`: no thread answers here."""
        return False

    async def aclose(self) -> None:
        """See `Carrier.aclose`."""
        await self._tunnels.aclose()


def _abandon(connection: ClientConnection | None) -> None:
    if connection is not None:
        connection.fail(ConnectionLost("the handshake was given up"))
