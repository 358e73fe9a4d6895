"""The calling side of the tcp plane."""

from __future__ import annotations

from collections.abc import Callable

from dynamo_redis.config import PlaneSettings
from dynamo_redis.planes.base import Target
from dynamo_redis.planes.frames.client import FrameClient
from dynamo_redis.planes.tcp.dial import TcpCarrier
from dynamo_redis.planes.tcp.tls import make_tls


class TcpClient(FrameClient):
    """Implements `RequestPlaneClient` over sockets."""

    def __init__(self, settings: PlaneSettings, on_quiet: Callable[[Target], None] | None = None) -> None:
        """`on_quiet`: see `select.make_client`. Raises ConfigError for TLS files that cannot be used."""
        super().__init__(settings, TcpCarrier(make_tls(settings, "client")), on_quiet)
