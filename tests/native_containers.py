"""Runs the command lines of containers as processes of this machine.

Each container keeps its command, environment and mounts as its file has them. Replaced are the addresses of
other containers, its own ports, and the paths of its mounts: all processes share this machine's network and
files.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from dynamo_redis.child import ChildProcess
from dynamo_redis.store.server import find_server

_READ_ONLY = """
while [ "$1" != -- ]; do mount --bind "$1" "$1" || exit 125; shift; done
shift
mount -o remount,ro,bind / || exit 125
exec "$@"
"""
"""Runs a program with all files of this machine read-only, but for the directories before the `--`."""


@dataclass(frozen=True)
class Container:
    """One container of a file. `host` is its name in the network; `ports` are those it listens on."""

    host: str
    argv: Sequence[str]
    env: Mapping[str, str]
    ports: Iterable[int] = ()
    mounts: Mapping[str, Path] = field(default_factory=dict)
    read_only: bool = False


@dataclass
class NativeContainers:
    """The containers of a deployment, by their hosts."""

    directory: Path
    containers: dict[str, Container]
    replaced: dict[str, str] = field(default_factory=dict)
    """Further texts, and their replacements."""
    processes: dict[str, ChildProcess] = field(default_factory=dict)
    _ports: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.directory / "bin"
        programs.mkdir()
        server = find_server().path
        (programs / "redis-server").symlink_to(server)
        # Not from PATH, where one of another release may come first.
        for name in ("redis-cli", "redis-sentinel"):
            if (server.parent / name).exists():
                (programs / name).symlink_to(server.parent / name)
        for container in self.containers.values():
            for port in container.ports:
                self._ports[container.host, port] = _free_port(self._ports.values())
            for place in container.mounts.values():
                if not place.is_file():
                    place.mkdir(parents=True, exist_ok=True)

    def has(self, program: str) -> bool:
        """Return true if there is this program of Redis, of the release of the server."""
        return (self.directory / "bin" / program).exists()

    def port(self, host: str, number: int) -> int:
        """Return the port of this machine that stands for a container's."""
        return self._ports[host, number]

    def localized(self, container: Container, text: str) -> str:
        """Return a text of the container with ports, paths and addresses of this machine."""
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        hosts = "|".join(sorted(map(re.escape, self.containers), key=len, reverse=True))

        def local(found: re.Match[str]) -> str:
            host, separator, number = found[1], found[2], int(found[3])
            port = self._ports.get((host or container.host, number))
            if port is None:
                return found[0]
            return f"127.0.0.1{separator}{port}" if host else str(port)

        text = re.sub(rf"(?:(?<![\w.-])({hosts})([: ]))?\b(\d{{4,5}})\b(?![.\d])", local, text)
        if not container.mounts:
            return text
        paths = "|".join(sorted(map(re.escape, container.mounts), key=len, reverse=True))
        return re.sub(
            rf"(?<![\w/.-])({paths})(?![\w.-])", lambda found: str(container.mounts[found[1]]), text
        )

    def environment(self, host: str) -> dict[str, str]:
        """Return a container's variables, and nothing of this process's but PATH."""
        container = self.containers[host]
        places = [str(self.directory / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        own = {name: self.localized(container, text) for name, text in container.env.items()}
        home = str(self.directory / "home")  # absent, as a home that cannot be written
        return {"PATH": os.pathsep.join(places), "HOME": home, **own}

    def start(self, host: str) -> ChildProcess:
        """Start a container's process. Its output goes to `HOST.log`."""
        container = self.containers[host]
        argv = [self.localized(container, word) for word in container.argv]
        if container.read_only and can_mount():
            kept = [str(place) for place in container.mounts.values() if place.is_dir()]
            argv = ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", *kept, "--", *argv]
        with self.log(host).open("ab") as log:
            process = ChildProcess.start(
                argv, env=self.environment(host), cwd=self._workdir(container), stdout=log, stderr=log
            )
        self.processes[host] = process
        return process

    def _workdir(self, container: Container) -> Path:
        return container.mounts.get("/data", self.directory)  # that of the images of Redis

    def log(self, host: str) -> Path:
        return self.directory / f"{host}.log"

    async def run(self, host: str, argv: Sequence[str]) -> int:
        """Run a command in a container, such as a health check. Return its exit code."""
        container = self.containers[host]
        words = [self.localized(container, word) for word in argv]
        with self.log(f"{host}.run").open("ab") as log:
            process = ChildProcess.start(
                words, env=self.environment(host), cwd=self._workdir(container), stdout=log, stderr=log
            )
            return await process.wait(60)

    async def until_it_succeeds(self, host: str, argv: Sequence[str], *, within_s: float = 90.0) -> None:
        """Run a health check of a container until it succeeds. Fails if a process has ended."""
        try:
            with anyio.fail_after(within_s):
                while await self.run(host, argv) != 0:
                    self.check_all_run()
                    await anyio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{host}: {argv} does not succeed\n{self.logs()}") from None

    async def is_listening(self, host: str, number: int, *, within_s: float = 60.0) -> bool:
        """Wait until a container listens on a port. Return False if it ends before."""
        with anyio.fail_after(within_s):
            while self.processes[host].returncode is None:
                try:
                    stream = await anyio.connect_tcp("127.0.0.1", self.port(host, number))
                except OSError:
                    await anyio.sleep(0.02)
                else:
                    await stream.aclose()
                    return True
        return False

    def check_all_run(self) -> None:
        for host, process in self.processes.items():
            assert process.returncode is None, f"{host} ended with {process.returncode}\n{self.logs()}"

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}"
            for path in sorted(self.directory.glob("*.log"))
        )

    async def stop(self, host: str, grace_s: float) -> int:
        """Stop a container as an engine does: SIGTERM, and SIGKILL after the grace. Return its exit code."""
        return await self.processes.pop(host).stop(grace_s)

    async def stop_all(self) -> None:
        for process in reversed(self.processes.values()):
            await process.stop(1.0)


def can_mount() -> bool:
    """Return true if this process may mount a file system read-only for a program that it starts."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    argv = ["unshare", "--mount", "mount", "-o", "remount,ro,bind", "/"]
    return subprocess.run(argv, capture_output=True, timeout=60).returncode == 0


def _free_port(taken: Iterable[int]) -> int:
    """Return a port outside the range of which the kernel takes ports for others, so that it stays free.

    Each of pytest's processes has a range of its own, as it has 10,000 above it, for the nodes of a cluster.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    while True:
        port = 11000 + 1000 * number + random.SystemRandom().randrange(1000)
        if port in taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
