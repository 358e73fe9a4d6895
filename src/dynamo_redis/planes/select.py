"""Chooses the request plane by its setting, and imports no other."""

from __future__ import annotations

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer


def make_client(settings: PlaneSettings) -> RequestPlaneClient:
    """The client of the chosen plane. Raises ConfigError if this release does not have the plane."""
    _require_tcp(settings)
    from dynamo_redis.planes.tcp_client import TcpClient

    return TcpClient(settings)


def make_server(
    settings: PlaneSettings, *, instance_id: int, secret: bytes | None, redis_url: str | None
) -> RequestPlaneServer:
    """The server of the chosen plane, not yet listening.

    `redis_url` decides what to advertise where no address is set: loopback if Redis is on loopback, else the
    local address that reaches Redis. Raises ConfigError if this release does not have the plane.
    """
    _require_tcp(settings)
    from dynamo_redis.planes.tcp_server import TcpServer

    return TcpServer(settings, secret=secret, instance_id=instance_id, redis_url=redis_url)


def _require_tcp(settings: PlaneSettings) -> None:
    if settings.request_plane != "tcp":
        raise ConfigError(f"DYN_REQUEST_PLANE={settings.request_plane}: this release has the tcp plane only")
