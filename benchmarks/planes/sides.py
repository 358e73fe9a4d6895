"""The sides of suite `planes`: our planes, and what else does the same work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Final

from benchmarks.harness.processes import (
    DYNAMO,
    REPOSITORY,
    dynamo_environment,
    redis_server,
    rival_python,
)
from benchmarks.request.matrix import WORKERS
from benchmarks.request.sides import Side, nats, nats_server, peers, runtime

TCP, HTTP, NATS, REDIS = "ours tcp", "ours http", "ours nats", "ours redis"
LAST_RELEASE = "ours tcp, last release"
HYPERCORN, NATS_PY = "hypercorn + httpx", "nats-py"
OUR_NATS_RUNTIME, DYNAMO_NATS_RUNTIME = "ours nats, runtime API", "Dynamo 1.6.1 nats, runtime API"

LAST_RELEASE_COMMIT: Final = "4d5b804"
"""The commit before there was another plane than tcp."""

DYNAMO_THREADS: Final = 4
"""The fewest threads of Dynamo's runtime, which by default has one a core. The registration of an endpoint
with NATS holds one: with two threads, three endpoints that are registered at once wait for ever."""


@contextmanager
def _ours(plane: str, environment: dict[str, str] | None = None) -> Iterator[Side]:
    """Run a plane of ours, with its broker if it has one."""
    variables = {"DYN_REQUEST_PLANE": plane, "DYN_HTTP_RPC_PORT": "0", **(environment or {})}
    if plane == "nats":
        with (
            nats_server() as (url, _),
            peers(sys.executable, "plane", environment=variables | {"NATS_SERVER": url}) as side,
        ):
            yield side
    elif plane == "redis":
        with (
            redis_server() as server,
            peers(sys.executable, "plane", environment=variables | {"DYN_REDIS_URL": server.url}) as side,
        ):
            yield side
    else:
        with peers(sys.executable, "plane", environment=variables) as side:
            yield side


@contextmanager
def _last_release() -> Iterator[Side]:
    """Run the tcp plane of the last release, from git, with the libraries of today."""
    directory = REPOSITORY / ".bench" / f"release-{LAST_RELEASE_COMMIT}"
    if not directory.exists():
        archive = subprocess.run(
            ["git", "archive", LAST_RELEASE_COMMIT, "src"], cwd=REPOSITORY, capture_output=True, check=True
        ).stdout
        unpacked = directory.with_suffix(".new")
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(unpacked, filter="data")
        unpacked.rename(directory)
    path = os.pathsep.join((str(Path(directory) / "src"), str(REPOSITORY)))
    with _ours("tcp", {"PYTHONPATH": path}) as side:
        yield side


@contextmanager
def _our_nats_runtime() -> Iterator[Side]:
    with redis_server() as server, nats_server() as (url, _):
        environment = {
            "DYN_REDIS_URL": server.url,
            "DYN_REDIS_PREFIX": "bench-planes",
            "DYN_REQUEST_PLANE": "nats",
            "NATS_SERVER": url,
        }
        with runtime(sys.executable, "dynamo_redis.runtime", environment, WORKERS) as side:
            yield side


@contextmanager
def _dynamo_nats_runtime() -> Iterator[Side]:
    with nats_server() as (url, _), dynamo_environment() as environment:
        variables = {
            **environment,
            "DYN_REQUEST_PLANE": "nats",
            "NATS_SERVER": url,
            "DYN_RUNTIME_NUM_WORKER_THREADS": str(max(DYNAMO_THREADS, os.cpu_count() or 1)),
        }
        with runtime(rival_python("dynamo", DYNAMO, "uvloop"), "dynamo.runtime", variables, WORKERS) as side:
            yield side


SIDES: dict[str, Callable[[], AbstractContextManager[Side]]] = {
    TCP: lambda: _ours("tcp"),
    LAST_RELEASE: _last_release,
    HTTP: lambda: _ours("http"),
    NATS: lambda: _ours("nats"),
    REDIS: lambda: _ours("redis"),
    HYPERCORN: lambda: peers(rival_python("hypercorn", "hypercorn", "httpx[http2]", "uvloop"), "hypercorn"),
    NATS_PY: lambda: nats("messages"),
    OUR_NATS_RUNTIME: _our_nats_runtime,
    DYNAMO_NATS_RUNTIME: _dynamo_nats_runtime,
}
"""The function that starts each side."""
