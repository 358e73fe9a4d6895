"""Ways of a process to several servers, by a proxy to each. The servers' own answers name the proxies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dynamo_redis.store.sentinel_server import MASTER_NAME
from faults.proxy import Conditions, Connection, Proxy, Side

_HOST: Final = b"127.0.0.1"


class NamingProxy(Proxy):
    """A proxy that replaces the addresses of servers in their answers. All ports have five digits, so the
    lengths in the protocol stay right."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.replaced: list[tuple[bytes, bytes]] = []
        """Bytes of answers, and what they become."""

    def translate(self, content: bytes, towards: Side) -> bytes:
        if towards == "client":
            for named, own in self.replaced:
                content = content.replace(named, own)
        return content


class ManyProxies:
    """The proxies of one process: a fault applies to all of them. The first are those of the servers."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._proxies = [NamingProxy(target) for target in targets]

    async def start(self) -> None:
        """Listen."""
        for proxy in self._proxies:
            await proxy.start()

    async def aclose(self) -> None:
        """Stop listening and break all connections."""
        for proxy in self._proxies:
            await proxy.aclose()

    @property
    def connections(self) -> list[Connection]:
        """All connections."""
        return [connection for proxy in self._proxies for connection in proxy.connections]

    @property
    def has_swallowed(self) -> bool:
        """As `Proxy.has_swallowed`."""
        return any(proxy.has_swallowed for proxy in self._proxies)

    @property
    def conditions(self) -> Conditions:
        """The conditions of all connections."""
        return self._proxies[0].conditions

    @conditions.setter
    def conditions(self, conditions: Conditions) -> None:
        for proxy in self._proxies:
            proxy.conditions = conditions

    @property
    def refuse(self) -> bool:
        """True if new connections are refused."""
        return self._proxies[0].refuse

    @refuse.setter
    def refuse(self, refuse: bool) -> None:
        for proxy in self._proxies:
            proxy.refuse = refuse

    def cut(self) -> None:
        """Break all connections."""
        for proxy in self._proxies:
            proxy.cut()

    def cut_one(self) -> None:
        """Break the oldest connection to the first server that has one."""
        next((proxy for proxy in self._proxies if proxy.connections), self._proxies[0]).cut_one()

    def half_close(self, towards: Side) -> None:
        """Half-close all connections."""
        for proxy in self._proxies:
            proxy.half_close(towards)

    def heal(self) -> None:
        """Return to a good network; connections that have lost bytes break."""
        for proxy in self._proxies:
            proxy.heal()


class SentinelLink(ManyProxies):
    """The way to servers behind sentinels."""

    def __init__(self, servers: Sequence[str], sentinels: Sequence[str]) -> None:
        super().__init__([*servers, *sentinels])
        self._servers, self._sentinels = self._proxies[: len(servers)], self._proxies[len(servers) :]

    @property
    def url(self) -> str:
        """The URL that the process uses."""
        return f"redis+sentinel://{_hosts(self._sentinels)}/{MASTER_NAME}"

    async def start(self) -> None:
        await super().start()
        for sentinel in self._sentinels:
            sentinel.replaced = [(_port(proxy.target), _port(proxy.url)) for proxy in self._servers]


class ClusterLink(ManyProxies):
    """The way to the nodes of a cluster.

    Redirects (`MOVED 1 127.0.0.1:12345`) and the table of slots name nodes. Data passes here, too, so a port
    is replaced only behind the host.
    """

    @property
    def url(self) -> str:
        """The URL that the process uses."""
        return f"redis+cluster://{_hosts(self._proxies)}"

    async def start(self) -> None:
        await super().start()
        ports = [(_port(proxy.target), _port(proxy.url)) for proxy in self._proxies]
        replaced = [
            (_HOST + between + port, _HOST + between + own)
            for port, own in ports
            for between in (b":", b"\r\n:")
        ]
        for proxy in self._proxies:
            proxy.replaced = replaced


def _hosts(proxies: Sequence[Proxy]) -> str:
    return ",".join(proxy.url.removeprefix("redis://") for proxy in proxies)


def _port(url: str) -> bytes:
    return url.rpartition(":")[2].encode()
