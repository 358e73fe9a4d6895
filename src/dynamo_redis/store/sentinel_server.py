"""A primary, replicas and Sentinels on loopback ports: for tests and benchmarks, never for production.

async with SentinelDeployment(directory) as deployment:
    registry = RedisRegistry(StoreSettings.load(redis_url=deployment.url))
    old = await deployment.primary()
    await old.kill()
    new = await deployment.wait_for_primary(other_than=old)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import anyio

from dynamo_redis.errors import StoreError, StoreUnavailable
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer, ServerBinary

MASTER_NAME: Final = "mymaster"
SENTINELS_COUNT: Final = 3
REPLICAS_COUNT: Final = 2
DOWN_AFTER_S: Final = 0.5
FAILOVER_TIMEOUT_S: Final = 3.0
START_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.02
_ADMIN_TIMEOUT_S: Final = 5.0


class EmbeddedSentinel(EmbeddedServer):
    """A Sentinel that monitors one primary. It keeps what it learns in `directory`, over restarts.

    `settings` are lines of sentinel.conf in addition, with their values.
    """

    def __init__(
        self,
        directory: Path,
        primary_port: int,
        *,
        port: int = 0,
        binary: ServerBinary | None = None,
        quorum: int = 2,
        down_after_s: float = DOWN_AFTER_S,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory, port=port, binary=binary)
        lines = [
            f"sentinel monitor {MASTER_NAME} 127.0.0.1 {primary_port} {quorum}",
            f"sentinel down-after-milliseconds {MASTER_NAME} {round(down_after_s * 1000)}",
            f"sentinel failover-timeout {MASTER_NAME} {round(FAILOVER_TIMEOUT_S * 1000)}",
            f"sentinel parallel-syncs {MASTER_NAME} {REPLICAS_COUNT}",
            *(f"{name} {value}" for name, value in (settings or {}).items()),
        ]
        self._config_path = directory / "sentinel.conf"
        self._config_path.write_text("\n".join(lines) + "\n")

    def _arguments(self) -> list[str]:
        directory = str(self._directory.absolute())
        where = ["--port", str(self._port), "--bind", "127.0.0.1", "--dir", directory]
        return [str(self._config_path.absolute()), "--sentinel", *where]


class SentinelDeployment:
    """A primary, its replicas, and the Sentinels that monitor them.

    Use it as an async context manager, or `start` and `stop` it; it is bound to no event loop.

    Attributes:
        servers: The first is the primary at the start. Stop, kill and freeze each as an `EmbeddedServer`.
        sentinels: Likewise.
    """

    def __init__(
        self,
        directory: Path,
        *,
        binary: ServerBinary | None = None,
        servers: Sequence[EmbeddedServer] | None = None,
        server_settings: Mapping[str, str] | None = None,
        sentinel_settings: Mapping[str, str] | None = None,
        down_after_s: float = DOWN_AFTER_S,
    ) -> None:
        """`servers`: existing ones, which run on ports; None: new ones, one primary and two replicas.

        With `requirepass` among `sentinel_settings`, the deployment asks its sentinels with that password."""
        self._directory = directory
        self._binary = binary
        self._settings = dict(sentinel_settings or {})
        self._down_after_s = down_after_s
        self._clients: dict[str, RedisClient] = {}
        self.sentinels: list[EmbeddedSentinel] = []
        self._owns_servers = servers is None
        self.servers = list(servers or ())
        for number in range(0 if servers else 1 + REPLICAS_COUNT):
            path = directory / f"server-{number}"
            path.mkdir(parents=True)
            self.servers.append(EmbeddedServer(path, port=0, binary=binary, settings=server_settings))

    @property
    def url(self) -> str:
        """The URL of the deployment, without users and passwords."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{MASTER_NAME}"

    # ------------------------------------------------------------------ life

    async def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all, and wait until a failover is possible. Raises StoreUnavailable, or TimeoutError."""
        with anyio.fail_after(timeout_s):
            primary, *replicas = self.servers
            for server in self.servers:
                await server.start()
            for replica in replicas:
                await self.execute(replica, "REPLICAOF", "127.0.0.1", primary.port or 0)
            for replica in replicas:
                await self.wait_for_info(replica, "replication", "master_link_status:up")
            for number in range(SENTINELS_COUNT):
                path = self._directory / f"sentinel-{number}"
                path.mkdir(parents=True)
                self.sentinels.append(
                    EmbeddedSentinel(
                        path,
                        primary.port or 0,
                        binary=self._binary,
                        down_after_s=self._down_after_s,
                        settings=self._settings,
                    )
                )
                await self.sentinels[-1].start()
            await self.wait_until_ready()

    async def stop(self) -> None:
        """Kill all that was started here."""
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()
        for one in (*self.sentinels, *(self.servers if self._owns_servers else ())):
            await one.kill()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.stop()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.stop()

    # ------------------------------------------------------------------ questions

    async def execute(self, server: EmbeddedServer, *words: str | int) -> Any:
        """Run one command on a server or a sentinel. Raises StoreError."""
        url = server.url
        password = self._settings.get("requirepass")
        if password is not None and server in self.sentinels:
            url = url.replace("//", f"//:{password}@")
        if url not in self._clients:
            self._clients[url] = RedisClient(url, timeout_s=_ADMIN_TIMEOUT_S, client_name="deployment")
        return await self._clients[url].execute(*words)

    async def wait_for_info(self, server: EmbeddedServer, section: str, *lines: str) -> None:
        """Wait until INFO shows these lines. Raises TimeoutError."""
        with anyio.fail_after(START_TIMEOUT_S):
            while True:
                found = (await self.execute(server, "INFO", section)).decode().splitlines()
                if set(lines) <= set(found):
                    return
                await anyio.sleep(_POLL_S)

    async def primary(self) -> EmbeddedServer:
        """Return the server that the first sentinel that answers names. Raises StoreUnavailable."""
        for sentinel in self.sentinels:
            if sentinel.pid is not None:
                return await self._named_by(sentinel)
        raise StoreUnavailable("no sentinel runs")

    async def _named_by(self, sentinel: EmbeddedServer) -> EmbeddedServer:
        _, port = await self.execute(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)
        return next(server for server in self.servers if server.port == int(port))

    async def wait_for_primary(
        self, *, other_than: EmbeddedServer, timeout_s: float = START_TIMEOUT_S, poll_s: float = _POLL_S
    ) -> tuple[EmbeddedServer, float]:
        """Wait until a sentinel names another primary. Return it, and the time of that (monotonic)."""
        with anyio.fail_after(timeout_s):
            while True:
                for sentinel in self.sentinels:
                    if sentinel.pid is not None:
                        named = await self._named_by(sentinel)
                        if named is not other_than:
                            return named, time.monotonic()
                await anyio.sleep(poll_s)

    async def wait_until_ready(self) -> None:
        """Wait until every sentinel knows the same primary, all running replicas of it, and the others."""
        running = sum(server.pid is not None for server in self.servers)
        with anyio.fail_after(START_TIMEOUT_S):
            waiting = [sentinel for sentinel in self.sentinels if sentinel.pid is not None]
            while waiting:
                if await self._is_ready(waiting[-1], running - 1):
                    waiting.pop()
                else:
                    await anyio.sleep(_POLL_S)

    async def _is_ready(self, sentinel: EmbeddedServer, replicas_count: int) -> bool:
        flat = [word.decode() for word in await self.execute(sentinel, "SENTINEL", "MASTER", MASTER_NAME)]
        state = dict(zip(flat[::2], flat[1::2], strict=True))
        others = sum(one.pid is not None for one in self.sentinels) - 1
        if state["flags"] != "master" or int(state["num-other-sentinels"]) < others:
            return False
        replicas = await self.execute(sentinel, "SENTINEL", "REPLICAS", MASTER_NAME)
        up = 0
        for replica in replicas:
            words = [word.decode() for word in replica]
            found = dict(zip(words[::2], words[1::2], strict=True))
            up += (
                found["flags"] == "slave"
                and found["master-link-status"] == "ok"
                and found["master-port"] == state["port"]
            )
        return up >= replicas_count

    # ------------------------------------------------------------------ faults

    async def cut_replication(self, primary: EmbeddedServer) -> None:
        """Keep the replicas from following the primary: a failover loses what it takes from now on."""
        for server in self.servers:
            if server is not primary and server.pid is not None:
                await self.execute(server, "CONFIG", "SET", "masteruser", "cut-off")
                await self.execute(server, "CONFIG", "SET", "masterauth", "cut-off")
        await self.execute(primary, "CLIENT", "KILL", "TYPE", "replica")
        await self.wait_for_info(primary, "replication", "connected_slaves:0")

    async def mend_replication(self) -> None:
        """Let replicas follow their primary again."""
        for server in self.servers:
            if server.pid is not None:
                await self.execute(server, "CONFIG", "SET", "masteruser", "")
                await self.execute(server, "CONFIG", "SET", "masterauth", "")

    async def fail_over(self) -> None:
        """Order a failover (SENTINEL FAILOVER), as soon as the sentinels can make one."""
        with anyio.fail_after(START_TIMEOUT_S):
            while True:
                try:
                    await self.execute(self.sentinels[0], "SENTINEL", "FAILOVER", MASTER_NAME)
                except StoreError:
                    await anyio.sleep(0.1)
                else:
                    return
