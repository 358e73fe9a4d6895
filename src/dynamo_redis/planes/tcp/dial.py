"""One attempt to reach an instance: dial, shake hands, and say in one kind of error why it failed."""

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
    """A connection whose handshake is done. `on_made` gets it as soon as TCP stands.

    The addresses of a host name are tried one after the other. `give_up_at` is the event loop's time. Raises
    CannotConnect, also where something else than an instance answers, or what the instance refuses with:
    AuthenticationFailed, Overloaded, …. Cancelling closes what was opened.
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
                raise ConnectionRefusedError("nobody listens there")
            await connection.shaken
    except TimeoutError:
        _abandon(connection)
        raise CannotConnect(f"no answer from {address} in {loop.time() - began:.1f} s") from None
    except (OSError, ValueError, ConnectionLost, ProtocolViolation) as exc:
        _abandon(connection)
        raise CannotConnect(f"cannot connect to {address}: {_explain(exc, address)}") from exc
    except asyncio.CancelledError:
        _abandon(connection)
        raise
    return connection


def _abandon(connection: ClientConnection | None) -> None:
    if connection is not None:
        connection.fail(ConnectionLost("the handshake was given up"))


def _explain(exc: Exception, address: str) -> str:
    if isinstance(exc, OSError) and exc.errno in (errno.EMFILE, errno.ENFILE):
        return f"no file is left for a connection ({describe_file_limit()})"
    return explain(exc, address)
