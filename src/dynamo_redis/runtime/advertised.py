"""The check of a process that its advertised address leads to itself."""

from __future__ import annotations

import logging

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError, PlaneError
from dynamo_redis.planes.base import RequestPlaneClient, Target

log = logging.getLogger(__name__)


async def check_advertised(client: RequestPlaneClient, own: Target, settings: PlaneSettings) -> None:
    """Dial this process's own server once, as callers will: with its secret, and over TLS where that is on.

    Logs a warning if the server does not answer there within `DYN_TCP_CONNECT_TIMEOUT`: behind some network
    routers an address leads here only from other machines. Raises ConfigError instead if
    `DYN_TCP_ADVERTISE_CHECK` requires an answer. With TLS and without `DYN_TCP_TLS_CA` nothing is dialled:
    the process could not verify its own certificate. Planes
    with a broker advertise no address of this process.
    """
    can_verify = settings.tcp_tls == "off" or settings.tcp_tls_ca is not None
    if settings.planes[0] != "tcp" or settings.tcp_advertise_check == "off" or not can_verify:
        return
    try:
        await client.probe(own, settings.connect_timeout_s)
    except PlaneError as exc:
        problem = (
            f"this process does not reach itself at {own.address}, the address that it advertises: {exc}. "
            "Unless that address leads here from other machines only, no caller reaches this process: set "
            "DYN_TCP_ADVERTISE_HOST and DYN_TCP_ADVERTISE_PORT to the address that callers dial"
        )
        if settings.tcp_advertise_check == "require":
            raise ConfigError(problem) from exc
        log.warning("%s (DYN_TCP_ADVERTISE_CHECK controls this check)", problem)
    finally:
        client.forget(own)
