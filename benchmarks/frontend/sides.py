"""The deployments of suite `frontend`, and a load on one of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil

from benchmarks.frontend.caller import Load
from benchmarks.frontend.prompts import MODEL
from benchmarks.harness.chats import first_model
from benchmarks.harness.processes import (
    DYNAMO,
    REPOSITORY,
    Driver,
    driver,
    dynamo_environment,
    free_port,
    redis_server,
    rival_python,
    running,
)

PROGRAM: Final = (sys.executable, "-m", "dynamo_redis")
DYNAMO_FRONTEND: Final = "ai-dynamo==1.6.1"
DYNAMO_NEEDS: Final = (
    DYNAMO,
    "msgspec",
    "numpy",
    "packaging",
    "pydantic",
    "pyyaml",
    "typing-extensions",
    "uvloop",
)
"""The modules that its frontend and its mocker import. It asks for many more, which only its engines need."""
FASTAPI_NEEDS: Final = ("fastapi==0.163.2", "uvicorn[standard]")
WORKERS: Final = 2
STEP_APART: Final = "1000000"
"""The speed-up of the mock engines on both sides at which a step takes no time, but is a step."""
READY_S: Final = 90.0
_RESTING_SHARE: Final = 0.1
CALLER: Final = "frontend.caller"


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement: a load's own figures, and the CPU seconds of each group of processes meanwhile."""

    seconds: float
    answers: int
    caller_cpu_s: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    cpu_s: dict[str, float]

    @property
    def per_s(self) -> float:
        """Requests answered a second."""
        return self.answers / self.seconds

    def cpu_ms(self, *groups: str) -> float:
        """Return the CPU time a request in ms, of all groups or of the given ones."""
        return 1e3 * sum(self.cpu_s[group] for group in groups or self.cpu_s) / self.answers

    def summary(self) -> str:
        """Return the figures in a few words."""
        parts = ", ".join(f"{group} {self.cpu_ms(group):.2f}" for group in self.cpu_s)
        caller_ms = 1e3 * self.caller_cpu_s / self.answers
        return (
            f"{self.per_s:.0f}/s, {self.cpu_ms():.2f} ms CPU a request ({parts}); caller {caller_ms:.2f} ms"
        )


class Side:
    """A running deployment: its port, and its processes by groups."""

    def __init__(self, port: int, groups: dict[str, Sequence[int]]) -> None:
        """`groups` are ids of processes; their children are counted with them."""
        self.port = port
        self._groups = {name: [psutil.Process(pid) for pid in pids] for name, pids in groups.items()}

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def pids(self, group: str) -> list[int]:
        """Return the ids of a group's processes, without their children."""
        return [process.pid for process in self._groups[group]]

    def busy_share(self, seconds: float) -> float:
        """Return the CPU time that the frontend takes for some seconds, as a part of them."""
        before = self._cpu_s()["frontend"]
        time.sleep(seconds)
        return (self._cpu_s()["frontend"] - before) / seconds

    def measure(self, caller: Driver, load: Load) -> Figures:
        """Put a load on. Raises RuntimeError if a chat fails."""
        caller.send(load.as_line())
        _expect(caller, "measuring")
        before = self._cpu_s()
        _expect(caller, "measured")
        after = self._cpu_s()
        answer = json.loads(caller.answer())
        return Figures(
            seconds=answer["seconds"],
            answers=answer["answers"],
            caller_cpu_s=answer["cpu_s"],
            first_token_p50_ms=answer["first_token_p50_ms"],
            first_token_p99_ms=answer["first_token_p99_ms"],
            cpu_s={name: after[name] - before[name] for name in after},
        )

    def _cpu_s(self) -> dict[str, float]:
        return {name: sum(map(tree_cpu_s, processes)) for name, processes in self._groups.items()}


def _expect(caller: Driver, word: str) -> None:
    if (line := caller.answer()) != word:
        raise RuntimeError(f"the caller said {line!r} instead of {word!r}")


def tree_cpu_s(process: psutil.Process) -> float:
    """Return the user and system time of a process, of its children that live, and of those that have
    ended."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:  # it has ended meanwhile: its parent's times have it
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@contextmanager
def callers(model: Path, seed: int = 1) -> Iterator[Driver]:
    """Run the load generator until the block ends."""
    with driver(sys.executable, CALLER, str(model), str(seed)) as caller:
        yield caller


def await_model(side: Side) -> None:
    """Wait until the deployment serves the model, and has ended the work of its start: a frontend of ours
    loads its faster tokenizer when it serves already. Raises RuntimeError."""
    if (name := first_model(side.url, READY_S)) != MODEL:
        raise RuntimeError(f"the deployment serves {name!r}")
    deadline = time.monotonic() + READY_S
    while (busy := side.busy_share(1.0)) > _RESTING_SHARE:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{side.url} takes {busy:.0%} of a core {READY_S:g} s after its start")


# --------------------------------------------------------------------------- our deployment


@dataclass(frozen=True, slots=True)
class Workers:
    """A Redis and the workers on it: the environment of processes that use them, and their ids."""

    environment: dict[str, str]
    redis_pid: int
    pids: list[int]


@contextmanager
def our_redis(model: Path) -> Iterator[Workers]:
    """Run a Redis until the block ends, for workers that are started one by one."""
    with redis_server() as server:
        environment = {
            "DYN_REDIS_URL": server.url,
            "DYN_REDIS_PREFIX": "bench-frontend",
            "DYN_LOG": "error",
            "DYN_MODEL_CACHE": str(model.with_name("cache")),
        }
        assert server.pid is not None
        yield Workers(environment, server.pid, [])


@contextmanager
def our_worker(workers: Workers, kind: str, model: Path, *options: str) -> Iterator[int]:
    """Run one worker, `mock` or `openai`, until the block ends, and yield its id, ready or not."""
    command = [*PROGRAM, "worker", kind, "--model-path", str(model), "--model-name", MODEL, *options]
    with running(command, workers.environment, stdout=subprocess.DEVNULL) as process:
        yield process.pid


@contextmanager
def our_workers(model: Path, *options: str) -> Iterator[Workers]:
    """Run a Redis and mock workers with these options until the block ends."""
    with ExitStack() as stack:
        workers = stack.enter_context(our_redis(model))
        for _ in range(WORKERS):
            workers.pids.append(stack.enter_context(our_worker(workers, "mock", model, *options)))
        yield workers


@contextmanager
def our_frontend(workers: Workers, *options: str) -> Iterator[Side]:
    """Run a frontend of ours for these workers until the block ends, and yield it when it is ready."""
    port = free_port()
    command = [*PROGRAM, "frontend", "--http-host", "127.0.0.1", "--http-port", str(port), *options]
    with running(command, workers.environment, stdout=subprocess.DEVNULL) as process:
        side = Side(port, {"frontend": [process.pid], "workers": workers.pids, "redis": [workers.redis_pid]})
        await_model(side)
        await_instances(side, len(workers.pids))
        yield side


def await_instances(side: Side, count: int) -> set[str]:
    """Wait until the frontend knows so many workers, and no more; return their instances. Raises
    RuntimeError."""
    deadline = time.monotonic() + READY_S
    while len(found := instances(side)) != count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{side.url} knows {len(found)} workers, not {count}, after {READY_S:g} s")
        time.sleep(0.05)
    return found


def instances(side: Side) -> set[str]:
    """Return the ids of the workers that our frontend knows."""
    return {
        str(each["instance_id"]) for each in httpx.get(f"{side.url}/health", timeout=5).json()["instances"]
    }


@contextmanager
def ours(model: Path, *, speedup: str = STEP_APART, frontend: Sequence[str] = ()) -> Iterator[Side]:
    """Run our whole deployment until the block ends."""
    with our_workers(model, "--speedup-ratio", speedup) as workers, our_frontend(workers, *frontend) as side:
        yield side


@contextmanager
def fastapi(workers: Workers, model: Path) -> Iterator[Side]:
    """Run the FastAPI frontend for our workers until the block ends."""
    python = rival_python("fastapi", *FASTAPI_NEEDS, "--editable", f"{REPOSITORY}[http]")
    port = free_port()
    command = [python, "-m", "benchmarks.frontend.rivals.fastapi_app", str(port), str(model), MODEL]
    with running(command, workers.environment, cwd=REPOSITORY) as process:
        side = Side(port, {"frontend": [process.pid], "workers": workers.pids, "redis": [workers.redis_pid]})
        await_model(side)
        yield side


# --------------------------------------------------------------------------- Dynamo's deployment


def dynamo_python() -> str:
    """Return the interpreter that has Dynamo's frontend and mocker."""
    return rival_python("dynamo-frontend", *DYNAMO_NEEDS, alone=(DYNAMO_FRONTEND,))


@contextmanager
def dynamo(model: Path, *options: str) -> Iterator[Side]:
    """Run Dynamo's Rust frontend and its mock workers, with these options, until the block ends."""
    python = dynamo_python()
    port = free_port()
    with ExitStack() as stack:
        environment = stack.enter_context(dynamo_environment())
        command = [python, "-m", "dynamo.frontend", "--http-port", str(port), "--http-host", "127.0.0.1"]
        frontend = stack.enter_context(running(command, environment))
        command = [python, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL]
        workers = [stack.enter_context(running([*command, *options], environment)) for _ in range(WORKERS)]
        side = Side(port, {"frontend": [frontend.pid], "workers": [worker.pid for worker in workers]})
        await_model(side)
        yield side
