"""Processes of a benchmark: servers, and programs that run on both sides."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dynamo_redis.store.server import EmbeddedServer

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = REPOSITORY / ".bench"
ECHOES = REPOSITORY / "benchmarks" / "start" / "rivals"
DYNAMO = "ai-dynamo-runtime==1.6.1"
INSTANCES = 4
_READY_S = 60


def rival_python(name: str, *requirements: str, alone: Sequence[str] = ()) -> str:
    """Return the interpreter of a rival's own virtual environment, which is made on first use. The
    requirements in `alone` are installed without those that they name themselves."""
    directory = BENCH / name
    python = directory / "bin" / "python"
    done = directory / ".installed"
    if not done.exists():
        print(f"installing {', '.join([*requirements, *alone])} into {directory.name} …", flush=True)
        venv.create(directory, with_pip=True, clear=True)  # also over an unfinished installation
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *requirements], check=True)
        if alone:
            subprocess.run([*install, "--no-deps", *alone], check=True)
        done.touch()
    return str(python)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run a command until the block ends, and yield its process."""
    process = subprocess.Popen(command, env={**os.environ, **environment}, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def redis_server(port: int | None = 0, settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedServer]:
    """Run an empty Redis until the block ends, on a loopback port; on a unix socket if `port` is None. It is
    started as by `dynamo-redis up`, with these `settings` besides."""
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedServer(Path(directory), port=port, settings=settings)
        asyncio.run(server.start())
        try:
            yield server
        finally:
            asyncio.run(server.stop())


class Driver:
    """A program of `rivals/` that takes commands as lines on standard input and answers with lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, line: str = "") -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """Wait for a line and return it. Raises RuntimeError if the program has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended without an answer")
        return line.strip()


@contextmanager
def driver(
    python: str, module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Driver]:
    """Run `benchmarks.MODULE` by an interpreter until the block ends, and yield its driver."""
    command = [python, "-m", f"benchmarks.{module}", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    variables = {"DYN_LOG": "error", **(environment or {})}
    with running(command, variables, cwd=REPOSITORY, **pipes) as process:
        yield Driver(process)


Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a new process, which ends afterwards, and return its result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def up(*arguments: str) -> Iterator[str]:
    """Run `dynamo-redis up` until the block ends, and yield its URL at once, ready or not."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-m", "dynamo_redis", "up", "--http-port", str(port), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "XDG_RUNTIME_DIR": directory},
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(15)


class EchoSide:
    """Four echo workers and a client on one of the two runtimes, each a process."""

    def __init__(self, client: subprocess.Popen[str]) -> None:
        self._client = client

    def round(self, requests: int, concurrency: int) -> dict[str, float]:
        """Run one round. Returns its requests/s and the client's CPU seconds."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write(f"{requests} {concurrency}\n")
        self._client.stdin.flush()
        answer: dict[str, float] = json.loads(self._client.stdout.readline())
        return {"per_s": requests / answer["seconds"], "cpu_s": answer["cpu_seconds"]}


@contextmanager
def echo_side(python: str, module: str, environment: Mapping[str, str]) -> Iterator[EchoSide]:
    """Run the echo deployment of one runtime until the block ends, and yield it when it is ready."""
    with ExitStack() as stack:
        for _ in range(INSTANCES):
            stack.enter_context(running([python, str(ECHOES / "echo_worker.py"), module], environment))
        client = stack.enter_context(
            running(
                [python, str(ECHOES / "echo_client.py"), module, str(INSTANCES)],
                environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        assert client.stdout is not None
        if client.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the client on {module} did not start")
        yield EchoSide(client)


@contextmanager
def dynamo_environment() -> Iterator[dict[str, str]]:
    """Yield the environment of Dynamo's own runtime on its tcp plane; discovery goes through files that are
    deleted when the block ends."""
    with tempfile.TemporaryDirectory() as directory:
        yield {
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": directory,
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_LOG": "off",
            "DYNAMO_SKIP_PYTHON_LOG_INIT": "1",
        }


@contextmanager
def dynamo_side() -> Iterator[EchoSide]:
    """Run the rival: Dynamo's own Python runtime, tcp plane, discovery through files."""
    python = rival_python("dynamo", DYNAMO)
    with dynamo_environment() as environment, echo_side(python, "dynamo.runtime", environment) as side:
        yield side


@contextmanager
def our_side(redis_url: str) -> Iterator[EchoSide]:
    """Run our runtime with its defaults."""
    environment = {"DYN_REDIS_URL": redis_url, "DYN_REDIS_PREFIX": "bench-echo", "DYN_LOG": "warn"}
    with echo_side(sys.executable, "dynamo_redis.runtime", environment) as side:
        yield side
