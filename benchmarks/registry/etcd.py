"""The rival of the registry suite: Debian's etcd-server, through a maintained Python client."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness.processes import free_port, rival_python, running

CLIENT = "aetcd==1.0.0"
_READY_S = 30.0


class EtcdMissing(RuntimeError):
    """There is no etcd on PATH."""

    def __init__(self) -> None:
        super().__init__(
            "the rival is not installed: no `etcd` on PATH. On Debian and Ubuntu: "
            "`apt-get install etcd-server` (it need not run as a service)"
        )


def etcd_binary() -> str:
    """Return the path of the server program. Raises EtcdMissing."""
    found = shutil.which("etcd")
    if found is None:
        raise EtcdMissing
    return found


def etcd_python() -> str:
    """Return an interpreter that has the client and none of our code."""
    return rival_python("etcd", CLIENT, "uvloop")


def etcd_version() -> str:
    """Return the server's version and that of the client."""
    output = subprocess.run([etcd_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"{output.splitlines()[0].lower().replace(' version:', '')} through {CLIENT}"


@contextmanager
def etcd() -> Iterator[str]:
    """Run a server with its defaults and a data directory of its own until the block ends, and yield its
    `host:port`."""
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    with tempfile.TemporaryDirectory() as directory:
        command = [etcd_binary(), "--name", "bench", "--data-dir", str(Path(directory) / "data")]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", f"bench={peer}"]
        log = Path(directory) / "log"
        with log.open("wb") as file, running(command, {}, stdout=file, stderr=file) as process:
            _wait_until_healthy(client, process, log)
            yield client.removeprefix("http://")


def _wait_until_healthy(url: str, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
                if json.load(answer)["health"] == "true":
                    return
        except (OSError, urllib.error.URLError, ValueError):
            pass
        time.sleep(0.05)
    raise RuntimeError(f"etcd did not start; the end of its log:\n{log.read_text()[-2000:]}")
