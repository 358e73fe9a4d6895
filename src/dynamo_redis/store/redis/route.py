"""The server that a client's connections go to, which may change while the client lives.

A `Route` is asked for the address each time a connection of a client is made, of whatever kind it is. When
the server becomes another one (a failover), the route's epoch grows. Connections of an earlier epoch are not
used again, and those in use are closed at once. A route may be shared by several clients, and is used from
event loops and threads alike.

- `FixedRoute`: the host of the URL. Its name is resolved anew for each connection.
- `sentinels.SentinelRoute`: the primary that Redis Sentinels name at that moment.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from dynamo_redis.store.redis.deadline import Watched
from dynamo_redis.store.redis.url import Address, ServerUrl, address

LEAVE_AGAIN_S: Final = 1.0
"""Shortest time between two replacements of all connections upon answers: the address may lead to the wrong
server again."""


class Route(ABC):
    """Knows the server of a client's connections. Safe from any thread, unless a method says otherwise."""

    needs_primary: bool = False
    """True: each new connection must show by ROLE that it leads to a primary."""

    def __init__(self) -> None:
        self._epoch = 0
        self._left_at = float("-inf")
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    @property
    @abstractmethod
    def address(self) -> str:
        """The server for messages: `host:port`, a socket's path, or a name with the present address."""

    @property
    def epoch(self) -> int:
        """Grows when existing connections have to be replaced: new ones may lead to another server."""
        return self._epoch

    @abstractmethod
    async def find(self) -> Address | None:
        """Return the address for a new connection; None: that of the URL. On the client's event loop.

        Raises RouteError if no address is known. Cancelling it is safe.
        """

    @abstractmethod
    def find_in_thread(self, timeout_s: float) -> Address | None:
        """As `find`, for a thread."""

    def failed(self, at: Address) -> None:
        """Note that no connection to an address could be made, or that it leads to a replica."""
        del at

    def leave(self) -> None:
        """Note that the server has answered that it is not, or no longer, the right one."""
        now = time.monotonic()
        if now - self._left_at >= LEAVE_AGAIN_S:
            self._left_at = now
            self._epoch += 1

    def add_listener(self, moved: Callable[[], None]) -> None:
        """Call `moved` each time the server has become another one, from any thread. It must not raise."""
        with self._lock:
            self._listeners.append(moved)

    def remove_listener(self, moved: Callable[[], None]) -> None:
        """Call `moved` no longer."""
        with self._lock:
            if moved in self._listeners:
                self._listeners.remove(moved)

    def _moved(self) -> None:
        """Note that new connections lead to another server."""
        self._epoch += 1
        with self._lock:
            listeners = tuple(self._listeners)
        for moved in listeners:
            moved()

    def release(self) -> None:
        """End one client's use of the route. Never waits."""
        return


class FixedRoute(Route):
    """The host of the URL."""

    def __init__(self, url: ServerUrl) -> None:
        super().__init__()
        self._address = address(url.options())

    @property
    def address(self) -> str:
        return self._address

    async def find(self) -> Address | None:
        return None

    def find_in_thread(self, timeout_s: float) -> Address | None:
        return None


def open_route(url: ServerUrl) -> Route:
    """Return the route of a URL. Its user releases it."""
    if url.sentinels:
        from dynamo_redis.store.redis.sentinels import SentinelRoute

        return SentinelRoute.shared(url)
    return FixedRoute(url)


# ---------------------------------------------------------------------- connections that ask


class _Routed:
    """The methods of a connection class of redis-py that ask a route for the address."""

    route: Route

    async def _connect(self) -> None:
        at = await self.route.find()
        if at is not None:
            self.host, self.port = at
        try:
            await super()._connect()  # type: ignore[misc]
        except Exception:
            if at is not None:
                self.route.failed(at)
            raise


class _RoutedInThread:
    """The same for a thread."""

    route: Route
    socket_connect_timeout: float

    def _connect(self) -> Any:
        at = self.route.find_in_thread(self.socket_connect_timeout)
        if at is not None:
            self.host, self.port = at
        try:
            return super()._connect()  # type: ignore[misc]
        except Exception:
            if at is not None:
                self.route.failed(at)
            raise


@cache
def _routed(connection_class: type, *parts: type) -> type:
    return type(f"Routed{connection_class.__name__}", (*parts, connection_class), {})


def route_options(options: dict[str, Any], route: Route) -> dict[str, Any]:
    """Return redis-py's options for connections over a route that report received bytes to a `Deadline`."""
    return _with_route(options, route, _Routed, Watched)


def route_thread_options(options: dict[str, Any], route: Route) -> dict[str, Any]:
    """Return redis-py's options for connections over a route, for a thread."""
    return _with_route(options, route, _RoutedInThread)


def _with_route(options: dict[str, Any], route: Route, *parts: type) -> dict[str, Any]:
    made = type("Connection", (_routed(options["connection_class"], *parts),), {"route": route})
    return options | {"connection_class": made}
