"""One attempt to reach an instance: dial, do the handshake, and report every failure as a PlaneError."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from dynamo_redis.errors import CannotConnect, ConnectionLost, ProtocolViolation
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.frames.client_connection import ClientConnection
from dynamo_redis.planes.tcp.life_signs import ask_for_life
from dynamo_redis.planes.tcp.listener import describe_file_limit
from dynamo_redis.planes.tcp.tls import TlsContext, dial_options, explain


class TcpCarrier:
    """Implements `Carrier` over sockets."""

    def __init__(self, tls: TlsContext | None) -> None:
        """`tls`: this side's TLS; None without."""
        self._tls = tls

    async def dial(
        self,
        target: Target,
        make: Callable[[], ClientConnection],
        on_made: Callable[[ClientConnection], None],
        give_up_at: float,
    ) -> ClientConnection:
        """See `Carrier.dial`. The addresses of a host name are tried one after the other. Raises
        CannotConnect also where another program answers."""
        address = target.address
        loop = asyncio.get_running_loop()
        began = loop.time()
        connection: ClientConnection | None = None
        try:
            host, port, options = dial_options(address, self._tls)
            async with asyncio.timeout_at(give_up_at):
                transport, connection = await loop.create_connection(make, host, port, **options)
                on_made(connection)
                if transport.get_extra_info("sockname") == transport.get_extra_info("peername"):
                    raise ConnectionRefusedError("no process listens there")
                await connection.handshake_done
        except TimeoutError:
            _abandon(connection)
            raise CannotConnect(f"no answer from {address} in {loop.time() - began:.1f} s") from None
        except (OSError, ValueError, ConnectionLost, ProtocolViolation) as exc:
            _abandon(connection)
            reason = explain(exc, address)
            if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
                reason = f"no file is left for a connection ({describe_file_limit()})"
            raise CannotConnect(f"cannot connect to {address}: {reason}") from exc
        except asyncio.CancelledError:
            _abandon(connection)
            raise
        return connection

    async def ask_for_life(self, target: Target) -> bool:
        """See `Carrier.ask_for_life`."""
        return await ask_for_life(target.address, target.secret, target.instance_id)

    async def aclose(self) -> None:
        """See `Carrier.aclose`."""


def _abandon(connection: ClientConnection | None) -> None:
    if connection is not None:
        connection.fail(ConnectionLost("the handshake was given up"))
