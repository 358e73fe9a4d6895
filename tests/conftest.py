"""Fixtures of all tests. The Redis server and the prefix come from the package's own pytest plugin,
`dynamo_redis.testing`, as they do for its users."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.store.server import EmbeddedServer

_THREADS_MAY_END_S = 20.0
_TASKS_MAY_END_S = 10.0

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Let the processes that tests start receive ^C, also where a shell started pytest in the background,
    with that signal ignored: child processes inherit ignored signals."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Return the event loop that the programs run on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def no_leaked_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread or a task behind.

    The event loop's own thread pool (name resolution) belongs to the loop and ends with it.
    """
    before = set(threading.enumerate())
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("no_leaked_tasks")
    yield
    deadline = time.monotonic() + _THREADS_MAY_END_S
    while (left := _threads_of_the_code() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"the test left threads: {sorted(thread.name for thread in left)}"


def _threads_of_the_code() -> set[threading.Thread]:
    pools = ("uvloop_", "asyncio_", "AnyIO worker")
    grpcio = "(_poll_wrapper)"  # ends when its last server or channel is collected as garbage
    return {
        thread
        for thread in threading.enumerate()
        if not thread.name.startswith(pools) and not thread.name.endswith(grpcio)
    }


@pytest.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fail a test that leaves a task behind, also by its fixtures. Requested before all others, checked
    last."""
    yield
    deadline = time.monotonic() + _TASKS_MAY_END_S
    while (left := _tasks_of_the_code()) and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    assert not left, f"the test left tasks: {left}"


def _tasks_of_the_code() -> list[asyncio.Task[object]]:
    """Return all tasks but those in which anyio's plugin runs tests and fixtures."""
    return [task for task in asyncio.all_tasks() if "TestRunner." not in str(task.get_coro())]


@pytest.fixture
def repository() -> Path:
    """Return the root of the checkout."""
    return REPOSITORY


@pytest.fixture
def shared() -> Path:
    """Return the directory of real inputs beside the checkout; skip the test where it is absent."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the inputs in {path}")
    return path


@pytest.fixture
async def own_redis_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """Run a server of the test's own, on a loopback port, which the test may kill, freeze, erase and
    restart."""
    directory = tmp_path / "redis"
    directory.mkdir()
    async with EmbeddedServer(directory, port=0) as server:
        yield server
