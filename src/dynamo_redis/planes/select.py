"""Chooses the request plane by its setting."""

from __future__ import annotations

from urllib.parse import urlsplit

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer
from dynamo_redis.planes.tcp_client import TcpClient
from dynamo_redis.planes.tcp_server import TcpServer


def make_server(
    settings: PlaneSettings,
    *,
    secret: bytes | None,
    instance_id: int,
    redis_url: str | None = None,
) -> RequestPlaneServer:
    """The server of the plane that `DYN_REQUEST_PLANE` names. Raises ConfigError.

    `secret` is the instance's, which callers must prove; None where `DYN_PLANE_AUTH` is off. `redis_url`
    is where this process finds Redis, if anywhere: it decides which address is advertised when the settings
    do not say (loopback without a Redis, or for one on a unix socket).
    """
    _check_plane(settings)
    redis_host = urlsplit(redis_url).hostname if redis_url else None
    return TcpServer(settings, secret=secret, instance_id=instance_id, redis_host=redis_host)


def make_client(settings: PlaneSettings) -> RequestPlaneClient:
    """The client of the plane that `DYN_REQUEST_PLANE` names. Raises ConfigError."""
    _check_plane(settings)
    return TcpClient(settings)


def _check_plane(settings: PlaneSettings) -> None:
    if settings.request_plane != "tcp":
        raise ConfigError(
            f"DYN_REQUEST_PLANE={settings.request_plane}: this release has the tcp plane only; unset it"
        )
