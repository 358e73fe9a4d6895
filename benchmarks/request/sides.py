"""The sides of suite `request`: the processes of each, and its measurement under a load.

Each side is a calling process and one or more serving ones, which live for the whole suite and wait for their
turns; `idle_share` measures the cost of waiting.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness.processes import (
    DYNAMO,
    Driver,
    driver,
    dynamo_environment,
    free_port,
    redis_server,
    rival_python,
    running,
)
from benchmarks.request.matrix import (
    AIOHTTP,
    DYNAMO_PLANE,
    DYNAMO_RUNTIME,
    GRPC,
    NATS,
    NATS_CALLBACK,
    OURS,
    OURS_RUNTIME,
    PYZMQ,
    RAW,
    RAW_CALLBACK,
    WORKERS,
)
from benchmarks.request.workloads import WORKLOADS

PEERS = "request.rivals.peers"

MAX_PAYLOAD_BYTES = 16 << 20
WARM_UP = 0.25
"""Length of the unmeasured load before a measurement, as a part of its time."""
_READY_S = 10.0


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement: units/s, the time of an answer, and CPU seconds of all processes for 100,000 units."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s_per_100k: float


class Side:
    """A running side."""

    def __init__(self, caller: Driver, servers: Sequence[int]) -> None:
        """`servers` are the ids of the serving processes."""
        self._caller = caller
        self._servers = [psutil.Process(pid) for pid in servers]
        self._processes = [*self._servers, psutil.Process(caller.pid)]

    def measure(self, name: str, seconds: float) -> Figures:
        """Put a workload on. Raises RuntimeError if the calling process ends over it."""
        self._load(name, WARM_UP * seconds)
        before = cpu_s(self._servers)
        answer = self._load(name, seconds)
        servers_cpu_s = cpu_s(self._servers) - before
        units = answer["count"] * WORKLOADS[name].units
        return Figures(
            units / answer["seconds"],
            answer["p50_ms"],
            answer["p99_ms"],
            1e5 * (answer["cpu_s"] + servers_cpu_s) / units,
        )

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its processes so far."""
        return cpu_s(self._processes)

    def _load(self, name: str, seconds: float) -> dict[str, float]:
        self._caller.send(json.dumps([name, seconds]))
        answer: dict[str, float] = json.loads(self._caller.answer())
        return answer


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Return the user and system time of the processes so far, in steps of a clock tick (10 ms)."""
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def idle_share(sides: Sequence[Side], seconds: float) -> float:
    """Return the part of one core that all sides together use without load."""
    before = sum(side.cpu_s() for side in sides)
    time.sleep(seconds)
    return (sum(side.cpu_s() for side in sides) - before) / seconds


@contextmanager
def peers(
    python: str, module: str, *how: str, environment: Mapping[str, str] | None = None
) -> Iterator[Side]:
    """Run a serving process, and one that calls it (`how`: arguments of its `connect`)."""
    with ExitStack() as stack:
        server = stack.enter_context(driver(python, PEERS, "serve", module, environment=environment))
        caller = stack.enter_context(
            driver(python, PEERS, "call", module, announced(server), *how, environment=environment)
        )
        announced(caller)
        yield Side(caller, [server.pid])


def announced(process: Driver) -> str:
    """Return the address after `ready`, if any. Raises RuntimeError if the process ends instead."""
    return process.answer().removeprefix("ready").strip()


@contextmanager
def nats(how: str) -> Iterator[Side]:
    """Run a server, and a subscriber and a caller that know only it. `how` is the way in which streams are
    read."""
    python = environment_of(NATS)
    with ExitStack() as stack:
        url, server_id = stack.enter_context(nats_server())
        subscriber = stack.enter_context(driver(python, PEERS, "serve", "nats", url))
        announced(subscriber)
        caller = stack.enter_context(driver(python, PEERS, "call", "nats", url, how))
        announced(caller)
        yield Side(caller, [server_id, subscriber.pid])


@contextmanager
def nats_server() -> Iterator[tuple[str, int]]:
    """Run a nats-server that carries the largest payload; yield its URL and process id. Raises
    RuntimeError."""
    binary = shutil.which("nats-server")
    if binary is None:
        raise RuntimeError("no `nats-server` on PATH; on Debian and Ubuntu: `apt-get install nats-server`")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        settings, log = Path(directory) / "nats.conf", Path(directory) / "log"
        settings.write_text(f"listen: 127.0.0.1:{port}\nmax_payload: {MAX_PAYLOAD_BYTES}\n")
        command = [binary, "-c", str(settings)]
        with log.open("wb") as file, running(command, {}, stdout=file, stderr=file) as process:
            _wait_until_ready(process, log)
            yield f"nats://127.0.0.1:{port}", process.pid


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        if "Server is ready" in log.read_text():
            return
        time.sleep(0.05)
    raise RuntimeError(f"nats-server did not start; the end of its log:\n{log.read_text()[-2000:]}")


@contextmanager
def runtime(python: str, module: str, environment: dict[str, str], workers: int) -> Iterator[Side]:
    """Run workers and a client of a runtime API, each a process."""
    with ExitStack() as stack:

        def process(*arguments: str) -> Driver:
            return stack.enter_context(driver(python, PEERS, *arguments, environment=environment))

        servers = [process("serve", "runtime", module) for _ in range(workers)]
        caller = process("call", "runtime", module, str(workers))
        for each in (*servers, caller):
            announced(each)
        yield Side(caller, [server.pid for server in servers])


@contextmanager
def dynamo(workers: int) -> Iterator[Side]:
    """Run Dynamo's own runtime: its tcp plane has no other public interface in Python."""
    python = environment_of(DYNAMO_PLANE)
    with (
        dynamo_environment() as environment,
        runtime(python, "dynamo.runtime", environment, workers) as side,
    ):
        yield side


@contextmanager
def our_runtime() -> Iterator[Side]:
    """Run our runtime, with its registry on a real Redis."""
    with redis_server() as server:
        environment = {"DYN_REDIS_URL": server.url, "DYN_REDIS_PREFIX": "bench-request"}
        with runtime(sys.executable, "dynamo_redis.runtime", environment, WORKERS) as side:
            yield side


_REQUIREMENTS = {
    NATS: ("nats", "nats-py"),
    GRPC: ("grpc", "grpcio"),
    AIOHTTP: ("aiohttp", "aiohttp"),
    PYZMQ: ("pyzmq", "pyzmq"),
    DYNAMO_PLANE: ("dynamo", DYNAMO),
}
"""The virtual environment of each rival, and the packages that are installed there beside uvloop."""


def environment_of(side: str) -> str:
    """Return the interpreter of a rival's environment, which is made on first use."""
    name, requirement = _REQUIREMENTS[side]
    return rival_python(name, requirement, "uvloop")


SIDES: dict[str, Callable[[], AbstractContextManager[Side]]] = {
    OURS: lambda: peers(sys.executable, "plane"),
    NATS: lambda: nats("messages"),
    NATS_CALLBACK: lambda: nats("callback"),
    GRPC: lambda: peers(environment_of(GRPC), "grpc"),
    AIOHTTP: lambda: peers(environment_of(AIOHTTP), "aiohttp"),
    PYZMQ: lambda: peers(environment_of(PYZMQ), "zmq"),
    RAW: lambda: peers(sys.executable, "raw"),
    RAW_CALLBACK: lambda: peers(sys.executable, "raw", "callback"),
    DYNAMO_PLANE: lambda: dynamo(1),
    OURS_RUNTIME: our_runtime,
    DYNAMO_RUNTIME: lambda: dynamo(WORKERS),
}
"""The function that starts each side."""

_VERSIONS = """
import sys
from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in sys.argv[1:]), sep=", ")
"""


def versions(sides: set[str]) -> list[str]:
    """Return the versions of the rivals among these sides. Installs those that are missing."""
    found = []
    for side, (_, requirement) in _REQUIREMENTS.items():
        if side not in sides:
            continue
        try:
            command = [environment_of(side), "-c", _VERSIONS, requirement.partition("==")[0], "uvloop"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(output.strip())
        except (subprocess.CalledProcessError, OSError) as exc:
            found.append(f"{requirement}: not installed ({exc})")
    if NATS in sides and (binary := shutil.which("nats-server")):
        output = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout
        found.append(output.strip().replace(": v", " "))
    return found
