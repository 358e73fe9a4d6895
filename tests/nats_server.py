"""A nats-server for tests: on loopback, on a port of its own, ended by its own process."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

_READY_S = 10.0


def find_nats_server() -> str | None:
    """Return the path of nats-server; None if it is not installed."""
    return shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/sbin")


class NatsServer:
    """One nats-server. `stop` and `start` again keep its port."""

    def __init__(self, directory: Path, settings: str = "") -> None:
        """`settings` are further lines of its configuration."""
        binary = find_nats_server()
        assert binary is not None, "nats-server is not installed"
        self._binary = binary
        self._directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def _write_config(self) -> Path:
        config = self._directory / "nats.conf"
        config.write_text(f'listen: "127.0.0.1:{self.port}"\n{self._settings}\n')
        return config

    def reload(self, settings: str) -> None:
        """Have it run with other settings; it ends the connections that these do not let in."""
        assert self._process is not None
        self._settings = settings
        self._write_config()
        self._process.send_signal(signal.SIGHUP)

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        config = self._write_config()
        self._process = subprocess.Popen(
            [self._binary, "--config", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert time.monotonic() < deadline, "nats-server does not start"
                assert self._process.poll() is None, "nats-server has ended"
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """Kill it, as a crash does. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
