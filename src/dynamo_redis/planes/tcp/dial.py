"""One attempt to reach an instance: dial, do the handshake, and report every failure as a PlaneError."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from dynamo_redis.errors import CannotConnect, ConnectionLost, ProtocolViolation
from dynamo_redis.planes.tcp.client_connection import ClientConnection
from dynamo_redis.planes.tcp.listener import describe_file_limit
from dynamo_redis.planes.tcp.tls import TlsContext, dial_options, explain


async def dial(
    address: str,
    tls: TlsContext | None,
    make: Callable[[], ClientConnection],
    on_made: Callable[[ClientConnection], None],
    give_up_at: float,
) -> ClientConnection:
    """Return a connection whose handshake is done.

    The addresses of a host name are tried one after the other. Cancelling closes the opened connection.

    Args:
        address: the instance's address, with its TLS mark.
        tls: this side's TLS; None without.
        make: makes the connection's protocol.
        on_made: is called with the connection once TCP and TLS stand, before the handshake.
        give_up_at: the time limit, in the event loop's time.

    Raises CannotConnect, also where another program answers, or the error that the instance refuses with:
    AuthenticationFailed, Overloaded, ….
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    connection: ClientConnection | None = None
    try:
        host, port, options = dial_options(address, tls)
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


def _abandon(connection: ClientConnection | None) -> None:
    if connection is not None:
        connection.fail(ConnectionLost("the handshake was given up"))
