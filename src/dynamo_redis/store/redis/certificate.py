"""The TLS session that a URL leads to: version, cipher and certificate, for people."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any

from dynamo_redis.config import RedisLogin
from dynamo_redis.store.redis.route import open_route
from dynamo_redis.store.redis.server_errors import FAILURES, store_error
from dynamo_redis.store.redis.url import make_connection, parse_server_url


@dataclass(frozen=True, slots=True)
class TlsSession:
    """A session with a server. `expires_at` is the end of its certificate, in seconds since 1970; None if
    the certificate is not verified. `has_own_certificate`: this side has shown one."""

    version: str
    cipher: str
    expires_at: float | None
    is_verified: bool
    checks_host: bool
    has_own_certificate: bool


async def tls_session(url: str, timeout_s: float, login: RedisLogin | None = None) -> TlsSession:
    """Connect as processes do, and return the session. Raises StoreError, ConfigError."""
    parsed = parse_server_url(url, login)
    route = open_route(parsed)
    options = parsed.options()
    options |= {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "protocol": 2}
    connection: Any = None
    try:
        async with asyncio.timeout(timeout_s):
            found = await route.find()
            if found is not None:
                options |= {"host": found[0], "port": found[1]}
            connection = make_connection(options)
            await connection.connect()
        peer = connection._writer.get_extra_info("ssl_object")
        certificate: dict[str, Any] = peer.getpeercert() or {}
        end = certificate.get("notAfter")
        context: ssl.SSLContext = peer.context
        return TlsSession(
            version=peer.version() or "",
            cipher=(peer.cipher() or ("",))[0],
            expires_at=None if end is None else float(ssl.cert_time_to_seconds(end)),
            is_verified=context.verify_mode is ssl.CERT_REQUIRED,
            checks_host=context.check_hostname,
            has_own_certificate=options.get("ssl_certfile") is not None,
        )
    except FAILURES as exc:
        raise store_error(exc, route.address, untested="tls") from exc
    finally:
        if connection is not None:
            await connection.disconnect(nowait=True)
        route.release()
