"""The servers of a run, and the way by which its processes reach them.

- `PlainStore`: one server, perhaps with a replica; each process has a proxy, which leads to the primary.
- `SentinelStore`: the same servers behind three Redis Sentinels. Each process has a proxy to each server and
  to each sentinel, and the addresses in the sentinels' answers are those of the process's own proxies. The
  sentinels fail over only when a scenario lets them (`automatic`), so that other faults do not also cost a
  primary.
- `cluster_store.ClusterStore`: a cluster.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Literal

from dynamo_redis.store.sentinel_server import MASTER_NAME, SentinelDeployment
from faults.links import SentinelLink
from faults.proxy import Link, Proxy
from faults.servers import ServerUnderTest

StoreName = Literal["plain", "sentinel", "cluster"]

NEVER_S: Final = 600.0
"""Time after which sentinels take a silent primary for dead, where a scenario causes no failover."""
DOWN_AFTER_S: Final = 0.5
FAILOVER_TIMEOUT_S: Final = 60.0


class Store(ABC):
    """The servers of a run. `server` is the primary, `replica` the other one, if there is one."""

    def __init__(self, servers: Sequence[ServerUnderTest]) -> None:
        self.servers = list(servers)
        self.server: ServerUnderTest
        self.replica: ServerUnderTest | None = None
        if servers:  # those of a cluster are known after its start
            self.server, self.replica = servers[0], servers[1] if len(servers) > 1 else None

    async def start(self) -> None:
        """Start all servers."""
        for server in self.servers:
            await server.start()

    async def aclose(self) -> None:
        """Stop all servers."""
        for server in self.servers:
            await server.aclose()

    @abstractmethod
    async def open_link(self) -> Link:
        """Return a new process's way to the servers."""

    # ------------------------------------------------------------------ a failover that loses writes

    @abstractmethod
    async def part(self, offset_s: float) -> None:
        """Part the replica from the primary, which goes on taking writes; shift the replica's clock."""

    def cut_off(self, links: Iterable[Link]) -> None:
        """Cut processes off from a primary that is about to be killed, if nothing else does."""
        del links

    @abstractmethod
    async def replace(self, links: Iterable[Link]) -> None:
        """Make the replica the primary of all processes, after the old one was killed."""

    # ------------------------------------------------------------------ a planned failover

    @abstractmethod
    async def hand_over(self) -> None:
        """Exchange the roles of primary and replica; nothing is lost."""

    def lead(self, links: Iterable[Link]) -> None:
        """Let new connections reach the new primary, if nothing else does."""
        del links

    def _exchange(self) -> None:
        assert self.replica is not None
        self.server, self.replica = self.replica, self.server


class PlainStore(Store):
    """One address for all."""

    async def start(self) -> None:
        await super().start()
        if self.replica is not None:
            await self.replica.replicate(self.server)

    async def open_link(self) -> Link:
        proxy = Proxy(self.server.url)
        await proxy.start()
        return proxy

    async def part(self, offset_s: float) -> None:
        assert self.replica is not None
        if offset_s:
            self.replica.set_clock(offset_s)
        await self.replica.promote()

    def cut_off(self, links: Iterable[Link]) -> None:
        for link in links:
            link.refuse = True
            link.cut()

    async def replace(self, links: Iterable[Link]) -> None:
        self._exchange()
        self.lead(links)

    async def hand_over(self) -> None:
        assert self.replica is not None
        await self.server.hand_over(self.replica)
        self._exchange()

    def lead(self, links: Iterable[Link]) -> None:
        for link in links:
            assert isinstance(link, Proxy)
            link.target = self.server.url


class SentinelStore(Store):
    """Sentinels that name the primary."""

    def __init__(self, servers: Sequence[ServerUnderTest], directory: Path) -> None:
        super().__init__(servers)
        self.sentinels = SentinelDeployment(
            directory,
            binary=servers[0].kind.binary,
            servers=[server.embedded for server in servers],
            down_after_s=NEVER_S,
        )

    async def start(self) -> None:
        await super().start()
        await self.sentinels.start()

    async def aclose(self) -> None:
        await self.sentinels.stop()
        await super().aclose()

    async def open_link(self) -> Link:
        link = SentinelLink(
            [server.url for server in self.servers], [sentinel.url for sentinel in self.sentinels.sentinels]
        )
        await link.start()
        return link

    async def part(self, offset_s: float) -> None:
        assert self.replica is not None
        if offset_s:
            self.replica.set_clock(offset_s)
        await self.sentinels.cut_replication(self.server.embedded)

    async def replace(self, links: Iterable[Link]) -> None:
        del links
        async with self.automatic():
            await self.wait_for_failover()
        await self.sentinels.mend_replication()

    async def hand_over(self) -> None:
        old, replica = self.server, self.replica
        assert replica is not None
        # The command alone loses the writes between the promotion and the old primary's demotion, which comes
        # some 10 s later if it is left to the sentinels.
        await old.pause_writes()
        await _wait_until_in_sync(old, replica)
        await self.sentinels.fail_over()
        await self.wait_for_failover()
        await old.replicate(self.server)
        await old.execute("CLIENT", "UNPAUSE")

    async def wait_for_failover(self) -> None:
        """Wait until the sentinels name another primary, and note it."""
        old = self.server.embedded
        named, _ = await self.sentinels.wait_for_primary(other_than=old, timeout_s=FAILOVER_TIMEOUT_S)
        assert self.replica is not None
        assert named is self.replica.embedded
        self._exchange()

    @asynccontextmanager
    async def automatic(self) -> AsyncIterator[None]:
        """Let the sentinels replace a primary that does not answer."""
        await self._set_down_after(DOWN_AFTER_S)
        try:
            yield
        finally:
            await self._set_down_after(NEVER_S)

    async def _set_down_after(self, seconds: float) -> None:
        setting = ("down-after-milliseconds", round(seconds * 1000))
        for sentinel in self.sentinels.sentinels:
            await self.sentinels.execute(sentinel, "SENTINEL", "SET", MASTER_NAME, *setting)


async def _wait_until_in_sync(primary: ServerUnderTest, replica: ServerUnderTest) -> None:
    async with asyncio.timeout(FAILOVER_TIMEOUT_S):
        while len({await _offset(primary), await _offset(replica)}) > 1:
            await asyncio.sleep(0.02)


async def _offset(server: ServerUnderTest) -> bytes:
    lines = (await server.execute("INFO", "replication")).splitlines()
    found: bytes = next(line for line in lines if line.startswith(b"master_repl_offset:"))
    return found
