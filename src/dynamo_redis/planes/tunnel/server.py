"""The serving side of a plane through a broker."""

from __future__ import annotations

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import CannotConnect, ConfigError
from dynamo_redis.planes.base import Describe
from dynamo_redis.planes.frames.server import FrameServer, ServerCore
from dynamo_redis.planes.tunnel.link import Link
from dynamo_redis.planes.tunnel.tunnels import Tunnels


class TunnelServer(FrameServer):
    """Implements `RequestPlaneServer`: accepts the connections that callers open at the link's address."""

    def __init__(
        self,
        plane: str,
        link: Link,
        settings: PlaneSettings,
        *,
        secret: bytes | None,
        instance_id: int,
        core: ServerCore | None = None,
    ) -> None:
        """See `select.make_server`."""
        super().__init__(settings, secret=secret, instance_id=instance_id, core=core)
        self._plane = plane
        self._link = link
        self._tunnels = Tunnels(link, self._new_connection)

    @property
    def plane(self) -> str:
        """The plane's name."""
        return self._plane

    async def start(self) -> None:
        """See `RequestPlaneServer.start`."""
        self._use_running_loop()
        try:
            await self._tunnels.start()
        except CannotConnect as exc:
            raise ConfigError(f"DYN_REQUEST_PLANE={self._plane}: {exc}") from exc
        self._address = self._link.address

    async def announce(self, describe: Describe) -> None:
        """See `RequestPlaneServer.announce`."""
        await self._link.announce(describe)

    async def _stop_accepting(self) -> None:
        self._tunnels.stop_accepting()

    async def _release(self) -> None:
        await self._tunnels.aclose()
