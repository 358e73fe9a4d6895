"""Whether the address that a process advertises leads to it, as far as can be seen from there."""

from __future__ import annotations

import logging

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError, PlaneError
from dynamo_redis.planes.base import RequestPlaneClient, Target

log = logging.getLogger(__name__)


async def check_advertised(client: RequestPlaneClient, own: Target, settings: PlaneSettings) -> None:
    """Dial this process's own server once, as callers will: with its secret, and over TLS where that is on.

    Warns if it does not answer there within `DYN_TCP_CONNECT_TIMEOUT`: behind some routers an address leads
    here only from other machines. Raises ConfigError if `DYN_TCP_ADVERTISE_CHECK` requires it. A process that
    is not told who signs certificates (`DYN_TCP_TLS_CA`) could not believe its own, and dials nothing.
    """
    believes_certificates = settings.tcp_tls == "off" or settings.tcp_tls_ca is not None
    if settings.tcp_advertise_check == "off" or not believes_certificates:
        return
    try:
        await client.probe(own, settings.connect_timeout_s)
    except PlaneError as exc:
        problem = (
            f"this process does not reach itself at {own.address}, the address that it advertises: {exc}. "
            "Unless only other machines are led here by it, no caller can: set DYN_TCP_ADVERTISE_HOST and "
            "DYN_TCP_ADVERTISE_PORT to what callers dial"
        )
        if settings.tcp_advertise_check == "require":
            raise ConfigError(problem) from exc
        log.warning("%s (DYN_TCP_ADVERTISE_CHECK says whether to look)", problem)
    finally:
        client.forget(own)
