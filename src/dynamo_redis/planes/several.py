"""One process that serves several planes, as while a deployment moves from one to the other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dynamo_redis.planes.base import Describe, Handler
from dynamo_redis.planes.frames.server import FrameServer
from dynamo_redis.planes.stats import EndpointStats


class SeveralServers:
    """Implements `RequestPlaneServer` with one server for each plane. They share one `ServerCore`, so limits
    and counts hold for all planes together."""

    def __init__(self, servers: Sequence[FrameServer]) -> None:
        """The first server's plane is the preferred one."""
        self._servers = servers
        self._first = servers[0]

    def __repr__(self) -> str:
        return f"<SeveralServers {', '.join(map(repr, self._servers))}>"

    @property
    def plane(self) -> str:
        """The preferred plane."""
        return self._first.plane

    @property
    def address(self) -> str:
        """The address on the preferred plane."""
        return self._first.address

    @property
    def addresses(self) -> dict[str, str]:
        """See `RequestPlaneServer.addresses`."""
        return {server.plane: server.address for server in self._servers}

    @property
    def connection_count(self) -> int:
        """See `RequestPlaneServer.connection_count`."""
        return sum(server.connection_count for server in self._servers)

    @property
    def in_flight_count(self) -> int:
        """See `RequestPlaneServer.in_flight_count`."""
        return self._first.in_flight_count

    async def start(self) -> None:
        """See `RequestPlaneServer.start`. If one server does not start, none is left running."""
        try:
            for server in self._servers:
                await server.start()
        except BaseException:
            await self.aclose()
            raise

    def register(self, subject: str, handler: Handler, *, request_stream: bool = False) -> None:
        """See `RequestPlaneServer.register`."""
        self._first.register(subject, handler, request_stream=request_stream)

    def stats(self, subject: str) -> EndpointStats | None:
        """See `RequestPlaneServer.stats`."""
        return self._first.stats(subject)

    async def announce(self, describe: Describe) -> None:
        """See `RequestPlaneServer.announce`."""
        for server in self._servers:
            await server.announce(describe)

    async def unregister(self, subject: str, *, grace_s: float) -> None:
        """See `RequestPlaneServer.unregister`."""
        await self._first.unregister(subject, grace_s=grace_s)

    async def drain(self, grace_s: float) -> None:
        """See `RequestPlaneServer.drain`."""
        await asyncio.gather(*(server.drain(grace_s) for server in self._servers))

    async def aclose(self) -> None:
        """See `RequestPlaneServer.aclose`."""
        for server in self._servers:
            await server.aclose()
