"""Chooses the request plane by its setting."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer, Target
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.planes.tcp.server import TcpServer


def make_server(
    settings: PlaneSettings,
    *,
    secret: bytes | None,
    instance_id: int,
    redis_url: str | None = None,
    loop_stall_s: float = 0.0,
) -> RequestPlaneServer:
    """The server of the plane that `DYN_REQUEST_PLANE` names. Raises ConfigError.

    `secret` is the instance's, which callers must prove; None where `DYN_PLANE_AUTH` is off. `redis_url`
    is where this process finds Redis, if anywhere: it decides which address is advertised when the settings
    do not say (loopback without a Redis, or for one on a unix socket). `loop_stall_s` is how long the event
    loop may hang before callers take the process for dead; 0: for ever.
    """
    redis_host = urlsplit(redis_url).hostname if redis_url else None
    return TcpServer(
        settings, secret=secret, instance_id=instance_id, redis_host=redis_host, loop_stall_s=loop_stall_s
    )


def make_client(
    settings: PlaneSettings, *, on_quiet: Callable[[Target], None] | None = None
) -> RequestPlaneClient:
    """The client of the plane that `DYN_REQUEST_PLANE` names. Raises ConfigError.

    `on_quiet` is called on the event loop, with any target of the instance, when an instance that owes an
    answer has given no sign of life for three quarters of `DYN_TCP_KEEPALIVE_S`. Requests under way there go
    on: it may be slow. Whoever chooses instances should prefer others, and probe.
    """
    return TcpClient(settings, on_quiet)
