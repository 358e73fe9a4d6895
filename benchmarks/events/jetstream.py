"""The rival of suite `events`: a nats-server with JetStream, and the interpreter with its client."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness.processes import free_port, rival_python, running

_READY_S = 10.0


def nats_python() -> str:
    """Return the interpreter that has the rival's client."""
    return rival_python("jetstream", "nats-py", "uvloop", "msgpack")


def nats_binary() -> str:
    """Return the path of nats-server. Raises RuntimeError if it is not installed."""
    binary = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise RuntimeError("no `nats-server` on PATH; on Debian and Ubuntu: `apt-get install nats-server`")
    return binary


@contextmanager
def nats_server() -> Iterator[str]:
    """Run a nats-server with JetStream on files until the block ends, and yield its URL. Raises RuntimeError
    if it is not installed or does not start."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        settings, log = Path(directory) / "nats.conf", Path(directory) / "log"
        interval = "" if sync_interval() is None else f'sync_interval: "{sync_interval()}"'
        settings.write_text(
            f'listen: "127.0.0.1:{port}"\n'
            f'jetstream {{ store_dir: "{directory}/store"\n {interval} }}\n'
            f'log_file: "{log}"\n'
        )
        with running([nats_binary(), "--config", str(settings)], {}):
            deadline = time.monotonic() + _READY_S
            while not (log.exists() and "Server is ready" in log.read_text()):
                if time.monotonic() > deadline:
                    raise RuntimeError("nats-server did not start")
                time.sleep(0.05)
            yield f"nats://127.0.0.1:{port}"


def sync_interval() -> str | None:
    """Return JetStream's `sync_interval`, equal to that of `appendfsync everysec`; None if this version has
    no such setting."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as settings:
        settings.write('jetstream { sync_interval: "1s" }\n')
        settings.flush()
        tried = subprocess.run([nats_binary(), "-t", "-c", settings.name], capture_output=True)
    return "1s" if tried.returncode == 0 else None
