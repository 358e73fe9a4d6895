"""A Redis or Valkey Cluster as the servers of a run: three masters with a replica each.

The primary of the run is the master of the registry's slot. Each process has a proxy to every node. Where a
node names another one, in a redirect or in the table of slots, the proxy replaces its port by that of the
process's own proxy. Replicas take the place of a master only where a scenario lets them (`automatic`).
"""

from __future__ import annotations

import asyncio
import contextlib
import string
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from dynamo_redis.errors import StoreError
from dynamo_redis.store.cluster_server import ClusterNode, EmbeddedCluster
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.cluster.slots import slot_of_key
from faults.links import ClusterLink
from faults.proxy import Link
from faults.servers import PERSISTENCE, Persistence, ServerKind, ServerUnderTest
from faults.stores import Store

_NO_FAILOVER: Final = "cluster-slave-no-failover"
"""The name that all releases know."""


class ClusterStore(Store):
    """A cluster. `server` and `replica` are those of the registry's slot."""

    def __init__(self, kind: ServerKind, directory: Path, persistence: Persistence, prefix: str) -> None:
        super().__init__([])
        directory.mkdir()
        self.cluster = EmbeddedCluster(
            directory, binary=kind.binary, settings={**PERSISTENCE[persistence], _NO_FAILOVER: "yes"}
        )
        self._kind = kind
        self._meta = RegistryKeys(prefix).meta
        self._of_node: dict[str, ServerUnderTest] = {}

    async def start(self) -> None:
        await self.cluster.start()
        for label, node in zip(string.ascii_lowercase, self.cluster.nodes, strict=False):
            server = ServerUnderTest(label, self._kind, node.server.directory, node=node.server)
            self.servers.append(server)
            self._of_node[node.node_id] = server
        await self.note_primary()

    async def aclose(self) -> None:
        await super().aclose()
        await self.cluster.stop()

    async def open_link(self) -> Link:
        link = ClusterLink([server.url for server in self.servers])
        await link.start()
        return link

    def node_of(self, server: ServerUnderTest) -> ClusterNode:
        """Return the node that is this server."""
        return next(node for node in self.cluster.nodes if self._of_node[node.node_id] is server)

    async def note_primary(self) -> None:
        """Find the master of the registry's slot, and its replica."""
        master = await self.cluster.owner_of(self._meta)
        replica = await self.cluster.replica_of(master)
        self.server, self.replica = self._of_node[master.node_id], self._of_node[replica.node_id]

    # ------------------------------------------------------------------ a failover that loses writes

    async def part(self, offset_s: float) -> None:
        assert not offset_s, "nodes of a cluster have the machine's clock"
        assert self.replica is not None
        await self._set_login(self.replica, "cut-off")
        await self.server.execute("CLIENT", "KILL", "TYPE", "replica")
        await self.server.wait_for_info("replication", "connected_slaves:0")

    async def replace(self, links: Iterable[Link]) -> None:
        del links
        replica = self.replica
        assert replica is not None
        await replica.execute("CLUSTER", "FAILOVER", "TAKEOVER")
        await replica.wait_for_info("replication", "role:master")
        await self._set_login(replica, "")
        self._exchange()

    async def _set_login(self, server: ServerUnderTest, word: str) -> None:
        for name in ("masteruser", "masterauth"):
            await server.execute("CONFIG", "SET", name, word)

    # ------------------------------------------------------------------ other changes of the primary

    async def hand_over(self) -> None:
        old, replica = self.server, self.replica
        assert replica is not None
        await self.cluster.failover(self.node_of(replica))
        await old.wait_for_info("replication", "role:slave", "master_link_status:up")
        self._exchange()

    async def wait_for_takeover(self) -> None:
        """Wait until the replica has taken the place of the primary, which does not answer."""
        replica = self.replica
        assert replica is not None
        await replica.wait_for_info("replication", "role:master")
        self._exchange()

    async def move(self, slot: int, target: ClusterNode) -> None:
        """Move a slot with its keys to another master."""
        await self.cluster.move_slot(slot, target)
        if slot == await self.cluster.slot_of(self._meta):
            await self.note_primary()

    @asynccontextmanager
    async def automatic(self) -> AsyncIterator[None]:
        """Let replicas replace a master that does not answer."""
        await self._set_no_failover("no")
        try:
            yield
        finally:
            await self._set_no_failover("yes")

    async def _set_no_failover(self, word: str) -> None:
        async def set_at(node: ClusterNode) -> None:
            with contextlib.suppress(StoreError):  # a node that is frozen
                await node.execute("CONFIG", "SET", _NO_FAILOVER, word)

        await asyncio.gather(*map(set_at, self.cluster.running()))

    async def used_slots(self) -> list[int]:
        """Return the slots of all keys, the registry's aside."""
        found: set[int] = set()
        for node in self.cluster.running():
            if await node.is_master():
                keys = await node.execute("KEYS", "*")
                found.update(map(slot_of_key, keys))
        return sorted(found - {await self.cluster.slot_of(self._meta)})
