"""Make the client or server of the request plane that the settings name."""

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
    """Make the server of the plane that `DYN_REQUEST_PLANE` names. Raises ConfigError.

    Args:
        settings: the plane's settings.
        secret: the instance's secret, which callers must prove; None where `DYN_PLANE_AUTH` is off.
        instance_id: the instance that callers must ask for.
        redis_url: this process's Redis, if it has one. It decides the advertised address when the settings
            name none (loopback without a Redis, or for one on a unix socket).
        loop_stall_s: seconds that the event loop may hang before callers take the process for dead; 0: for
            ever.
    """
    redis_host = urlsplit(redis_url).hostname if redis_url else None
    return TcpServer(
        settings, secret=secret, instance_id=instance_id, redis_host=redis_host, loop_stall_s=loop_stall_s
    )


def make_client(
    settings: PlaneSettings, *, on_quiet: Callable[[Target], None] | None = None
) -> RequestPlaneClient:
    """Make the client of the plane that `DYN_REQUEST_PLANE` names. Raises ConfigError.

    `on_quiet` is called on the event loop, with any target of the instance, when an instance with pending
    requests has given no sign of life for three quarters of `DYN_TCP_KEEPALIVE_S`. These requests continue:
    the instance may be slow. Code that chooses instances should prefer other ones, and probe this one.
    """
    return TcpClient(settings, on_quiet)
