"""Routes to nodes of a cluster, for clients of one node (`RedisClient`)."""

from __future__ import annotations

from dynamo_redis.store.redis.cluster.topology import Topology
from dynamo_redis.store.redis.route import Route
from dynamo_redis.store.redis.url import Address, show_address


class SlotRoute(Route):
    """Leads to the master that serves a slot."""

    def __init__(self, topology: Topology, slot: int) -> None:
        super().__init__()
        self._topology = topology
        self._slot = slot
        self._at = topology.owner(slot)
        topology.add_route(self)

    @property
    def address(self) -> str:
        return show_address(self._at) if self._at is not None else self._topology.address

    async def find(self) -> Address:
        self._at = await self._topology.find(self._slot)
        return self._at

    def find_in_thread(self, timeout_s: float) -> Address:
        self._at = self._topology.find_in_thread(self._slot, timeout_s)
        return self._at

    def failed(self, at: Address) -> None:
        self._topology.suspect()

    def leave(self) -> None:
        super().leave()
        self._topology.suspect()

    def check(self) -> None:
        """Leave the node if another one serves the slot now.

        If the node goes on as a master, what waits there ends with a MOVED within a second. An answer on its
        way is not lost by that.
        """
        before, at = self._at, self._topology.owner(self._slot)
        if at is None or at == before:
            return
        self._at = at
        if before in self._topology.masters:
            self._epoch += 1
        elif before is not None:
            self._moved()


class NodeRoute(Route):
    """Leads to one node."""

    def __init__(self, topology: Topology, at: Address) -> None:
        super().__init__()
        self._topology = topology
        self._at = at
        self._is_master = True
        topology.add_route(self)

    @property
    def address(self) -> str:
        return show_address(self._at)

    async def find(self) -> Address:
        return self._at

    def find_in_thread(self, timeout_s: float) -> Address:
        return self._at

    def failed(self, at: Address) -> None:
        self._topology.suspect()

    def leave(self) -> None:
        # Its other slots may be where they were: what connections ask it is not in vain.
        self._topology.suspect()

    def check(self) -> None:
        """Close all connections if the node has just ceased to be a master."""
        was_master, self._is_master = self._is_master, self._at in self._topology.masters
        if was_master and not self._is_master:
            self._moved()
