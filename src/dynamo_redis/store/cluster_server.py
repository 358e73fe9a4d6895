"""An embedded Redis or Valkey Cluster on loopback: for tests, never for production.

The nodes start with a finished `nodes.conf`, as nodes that have been stopped do: so they need not get to know
each other first. A master takes no commands for the first two seconds of its life (a rule of Redis).
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import anyio

from dynamo_redis.errors import StoreError, StoreRefused, StoreUnavailable
from dynamo_redis.store.redis.client import Argument, RedisClient
from dynamo_redis.store.server import EmbeddedServer, ServerBinary, find_server

_T = TypeVar("_T")

SLOTS_COUNT: Final = 16_384
BUS_DISTANCE: Final = 10_000
"""A node's port for the other nodes is its port plus this: the rule of Redis before 7.0."""

_PORTS: Final = range(12_000, 22_000)
"""These, and the ports for the other nodes, are below those that outgoing connections get."""
_PORT_TRIES: Final = 5
_LOOPBACK: Final = "127.0.0.1"
_POLL_S: Final = 0.02
_FAILOVER_TRIES: Final = 6
_FAILOVER_S: Final = 5.5
"""Somewhat more than the time after which Redis gives up a failover by command."""
_NODE_TIMEOUT_MS: Final = 1000
_COMMAND_TIMEOUT_S: Final = 5.0
_KEYS_A_CALL: Final = 100
_MIGRATE_TIMEOUT_MS: Final = 5000


@dataclass(eq=False, slots=True)
class ClusterNode:
    """One server of a cluster, with the role in which it was started."""

    node_id: str
    port: int
    server: EmbeddedServer
    first: int = 0
    end: int = 0
    """Slots of a master: from `first` up to `end`, exclusive. None for a replica."""
    master: ClusterNode | None = None

    def __repr__(self) -> str:
        return f"<ClusterNode {self.port}>"

    async def execute(self, *command: Argument) -> Any:
        """Run a command at this node, on a connection of its own. Raises StoreError."""
        client = RedisClient(f"redis://{_LOOPBACK}:{self.port}", timeout_s=_COMMAND_TIMEOUT_S)
        try:
            return await client.execute(*command)
        finally:
            await client.aclose()

    async def is_master(self) -> bool:
        """Return its present role. Raises StoreError."""
        return bool((await self.execute("ROLE"))[0] == b"master")


class EmbeddedCluster:
    """A cluster of masters, each with replicas, with its data in `directory`, which must exist.

    Use it as an async context manager, or `start` and `stop` it; it is bound to no event loop. `settings`
    extend or replace those of each server, as in `EmbeddedServer`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        masters_count: int = 3,
        replicas_count: int = 1,
        binary: ServerBinary | None = None,
        settings: dict[str, str | tuple[str, ...]] | None = None,
    ) -> None:
        """`replicas_count` is the number of replicas of each master."""
        self._directory = directory
        self._masters_count = masters_count
        self._replicas_count = replicas_count
        self._binary = binary or find_server()
        self._settings = settings or {}
        self.nodes: list[ClusterNode] = []
        """Masters first, in the order of their slots."""

    @property
    def url(self) -> str:
        """`redis+cluster://` with all nodes."""
        return "redis+cluster://" + ",".join(f"{_LOOPBACK}:{node.port}" for node in self.nodes)

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start all nodes and wait until each takes commands and each replica has its master's data.

        Raises StoreUnavailable; then no server runs.
        """
        with anyio.fail_after(timeout_s):
            for tries_left in reversed(range(_PORT_TRIES)):
                self._make_nodes()
                try:
                    async with anyio.create_task_group() as group:
                        for node in self.nodes:
                            group.start_soon(node.server.start, timeout_s)
                    break
                except* StoreUnavailable:
                    await self.stop()
                    if not tries_left:  # another process may have taken a port between probe and bind
                        raise
            await self.wait_until_whole()

    def _make_nodes(self) -> None:
        """Choose ports, and write the configuration of each node. Nothing is started."""
        ports = _free_ports(self._masters_count * (1 + self._replicas_count))
        self.nodes = [self._node(next(ports)) for _ in range(self._masters_count)]
        for index, node in enumerate(self.nodes):
            node.first = index * SLOTS_COUNT // self._masters_count
            node.end = (index + 1) * SLOTS_COUNT // self._masters_count
        for master in tuple(self.nodes):
            for _ in range(self._replicas_count):
                replica = self._node(next(ports))
                replica.master = master
                self.nodes.append(replica)
        for node in self.nodes:
            lines = [self._nodes_conf_line(other, is_self=other is node) for other in self.nodes]
            lines.append(f"vars currentEpoch {self._masters_count} lastVoteEpoch 0")
            path = self._node_directory(node.port) / "nodes.conf"
            path.write_text("".join(f"{line}\n" for line in lines))

    def _node(self, port: int) -> ClusterNode:
        directory = self._node_directory(port)
        directory.mkdir()
        settings: dict[str, str | tuple[str, ...]] = {
            "cluster-enabled": "yes",
            "cluster-config-file": "nodes.conf",
            "cluster-node-timeout": str(_NODE_TIMEOUT_MS),
            **self._settings,
        }
        server = EmbeddedServer(directory, port=port, binary=self._binary, settings=settings)
        return ClusterNode(secrets.token_hex(20), port, server)

    def _node_directory(self, port: int) -> Path:
        return self._directory / f"node-{port}"

    def _nodes_conf_line(self, node: ClusterNode, *, is_self: bool) -> str:
        owner = node.master or node
        epoch = self.nodes.index(owner) + 1
        role = "master -" if node.master is None else f"slave {owner.node_id}"
        slots = f" {node.first}-{node.end - 1}" if node.master is None else ""
        mark = "myself," if is_self else ""
        address = f"{_LOOPBACK}:{node.port}@{node.port + BUS_DISTANCE}"
        return f"{node.node_id} {address} {mark}{role} 0 0 {epoch} connected{slots}"

    async def stop(self) -> None:
        """Stop all nodes. Idempotent."""
        with anyio.CancelScope(shield=True):  # bounded by the grace of each server
            async with anyio.create_task_group() as group:
                for node in self.nodes:
                    group.start_soon(node.server.stop, 1.0)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    # ------------------------------------------------------------------ the present state

    def running(self) -> list[ClusterNode]:
        """Return the nodes whose server runs."""
        return [node for node in self.nodes if node.server.pid is not None]

    async def owner(self, slot: int) -> ClusterNode:
        """Return the master that serves a slot, as the running nodes agree. Waits until they do."""

        async def agreed() -> ClusterNode | None:
            ids = {await self._owner_id(node, slot) for node in self.running()}
            return next((node for node in self.running() if {node.node_id} == ids), None)

        return await self.until(agreed)

    async def _owner_id(self, node: ClusterNode, slot: int) -> str:
        for first, last, master, *_ in await node.execute("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return str(master[2].decode())
        return ""

    async def slot_of(self, key: str | bytes) -> int:
        """Return the slot of a key, as the server computes it."""
        return int(await self._ask("CLUSTER", "KEYSLOT", key))

    async def owner_of(self, key: str | bytes) -> ClusterNode:
        """Return the master that serves a key."""
        return await self.owner(await self.slot_of(key))

    async def replica_of(self, master: ClusterNode) -> ClusterNode:
        """Return a running replica of a master. Waits until there is one that has its data."""

        async def found() -> ClusterNode | None:
            for node in self.running():
                role, *rest = await node.execute("ROLE")
                if role == b"slave" and rest[1] == master.port and rest[2] == b"connected":
                    return node
            return None

        return await self.until(found)

    async def wait_until_whole(self) -> None:
        """Wait until all running nodes serve all slots, and each replica has its master's data."""

        async def is_whole() -> bool:
            for node in self.running():
                info = await node.execute("CLUSTER", "INFO")
                role, *rest = await node.execute("ROLE")
                if b"cluster_state:ok" not in info or (role == b"slave" and rest[2] != b"connected"):
                    return False
            return True

        await self.until(is_whole)

    # ------------------------------------------------------------------ faults and moves

    async def failover(self, replica: ClusterNode) -> None:
        """Have a replica take the place of its master, which lives on as its replica.

        Other masters do not vote for it soon after another failover, so it is asked again.
        """
        for tries_left in reversed(range(_FAILOVER_TRIES)):
            await replica.execute("CLUSTER", "FAILOVER")
            try:
                await self.until(replica.is_master, timeout_s=_FAILOVER_S)
            except TimeoutError:
                if not tries_left:
                    raise
            else:
                return

    async def begin_move(self, slot: int, target: ClusterNode) -> ClusterNode:
        """Mark a slot as moving to `target`; return the node that it comes from. No key has moved yet."""
        source = await self.owner(slot)
        await target.execute("CLUSTER", "SETSLOT", slot, "IMPORTING", source.node_id)
        await source.execute("CLUSTER", "SETSLOT", slot, "MIGRATING", target.node_id)
        return source

    async def move_keys(self, slot: int, source: ClusterNode, target: ClusterNode) -> None:
        """Move all keys of a slot that is marked as moving."""
        while keys := await source.execute("CLUSTER", "GETKEYSINSLOT", slot, _KEYS_A_CALL):
            await self.move_some_keys(keys, source, target)

    async def move_some_keys(
        self, keys: Iterable[Argument], source: ClusterNode, target: ClusterNode
    ) -> None:
        """Move these keys."""
        place = (_LOOPBACK, target.port, "", 0, _MIGRATE_TIMEOUT_MS)
        await source.execute("MIGRATE", *place, "KEYS", *keys)

    async def end_move(self, slot: int, target: ClusterNode) -> None:
        """Give a slot to the node that has its keys now, at each master."""
        nodes = [target, *(node for node in self.running() if node is not target)]
        for node in nodes:
            with contextlib.suppress(StoreRefused):  # a replica
                await node.execute("CLUSTER", "SETSLOT", slot, "NODE", target.node_id)

    async def move_slot(self, slot: int, target: ClusterNode) -> None:
        """Move a slot with its keys to another master, as `redis-cli --cluster reshard` does."""
        source = await self.begin_move(slot, target)
        await self.move_keys(slot, source, target)
        await self.end_move(slot, target)

    # ------------------------------------------------------------------

    async def _ask(self, *command: Argument) -> Any:
        return await self.running()[0].execute(*command)

    async def until(self, found: Callable[[], Awaitable[_T | None]], timeout_s: float = 30.0) -> _T:
        """Return the first answer that is true. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(StoreError):
                if answer := await found():
                    return answer
            await anyio.sleep(_POLL_S)
        states = [f"{node!r}: {node.server.log_tail()}" for node in self.nodes]
        raise TimeoutError("the cluster did not get into the wanted state:\n" + "\n".join(states))


def _free_ports(count: int) -> Iterator[int]:
    """Yield loopback ports that were free a moment ago, together with those for the other nodes."""
    found = 0
    while found < count:
        port = _PORTS[secrets.randbelow(len(_PORTS))]
        try:
            for probed in (port, port + BUS_DISTANCE):
                with socket.socket() as probe:
                    probe.bind((_LOOPBACK, probed))
        except OSError:
            continue
        found += 1
        yield port
