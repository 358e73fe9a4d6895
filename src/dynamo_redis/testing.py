"""pytest fixtures for those who build on this package; pytest loads them by itself once
`dynamo-redis[testing]` is installed.

    dynamo_redis_server    a Redis or Valkey for the whole session: `url`, and the `source` it came from
    dynamo_redis_url       its URL
    dynamo_redis_prefix    a registry prefix of the test's own, so that tests share the server and no key

The server is a container when a container engine answers, else `redis-server` or `valkey-server` on PATH,
else the one in `dynamo-redis[embedded]`; `DYN_TEST_REDIS` (container, path, wheel, or a URL) chooses. Without
any, tests that ask for it are skipped and say why; a source that was asked for by name and is not there
fails them.
"""

from __future__ import annotations

import gc
import logging
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pytest

# The plugin is loaded into every pytest run in which the package is installed: whatever costs time to import
# is imported by the fixtures.
if TYPE_CHECKING:
    from dynamo_redis.store.server import ServerBinary

_CONTAINER_IMAGE = "redis:7.4-alpine"
_CONTAINER_PORT = 6379
_CONTAINER_START_S = 30.0
_ENGINE_ANSWER_S = 2

Source = Literal["container", "path", "wheel", "url"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionRedis:
    """The server that the tests of a session share."""

    url: str
    source: Source


@pytest.fixture(scope="session")
def dynamo_redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SessionRedis]:
    """A Redis or Valkey server for the session. Tests share it: give each its `dynamo_redis_prefix`."""
    from dynamo_redis.config import FixtureSettings

    wanted = FixtureSettings.load().redis
    if "://" in wanted:
        yield SessionRedis(wanted, "url")
    elif wanted == "container" or (wanted == "auto" and _container_engine_answers()):
        with _container() as url:
            yield SessionRedis(url, "container")
    else:
        binary = _find_binary(wanted)
        with _embedded(binary, tmp_path_factory) as url:
            yield SessionRedis(url, binary.source)


@pytest.fixture
def dynamo_redis_url(dynamo_redis_server: SessionRedis) -> str:
    """The URL of the session's server."""
    return dynamo_redis_server.url


@pytest.fixture
def dynamo_redis_prefix() -> str:
    """A registry prefix (`DYN_REDIS_PREFIX`) that no other test has."""
    return f"test-{secrets.token_hex(8)}"


# --------------------------------------------------------------------------- where the server comes from


def _find_binary(wanted: str) -> ServerBinary:
    from dynamo_redis.errors import ConfigError
    from dynamo_redis.store.server import find_server

    if wanted == "path":
        return find_server("path")
    if wanted == "wheel":
        return find_server("wheel")
    try:
        return find_server()
    except ConfigError as exc:
        pytest.skip(f"{exc} (DYN_TEST_REDIS=redis://…), or start a container engine")


@contextmanager
def _embedded(binary: ServerBinary, directories: pytest.TempPathFactory) -> Iterator[str]:
    import anyio

    from dynamo_redis.store.server import EmbeddedServer

    # Loopback TCP, so that a test can also reach it through a proxy or from a container of its own.
    server = EmbeddedServer(directories.mktemp("redis"), port=0, binary=binary)
    # In a thread, because the fixture may be asked for while the test's event loop runs.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: anyio.run(server.start)).result()
    try:
        yield server.url
    finally:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: anyio.run(server.stop)).result()


def _container_engine_answers() -> bool:
    try:
        import docker
    except ImportError:
        return False
    with warnings.catch_warnings():
        # Where nothing answers, the library drops its socket unclosed: the suite's warnings are not for that.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            client = docker.from_env(timeout=_ENGINE_ANSWER_S)
            try:
                return bool(client.ping())
            finally:
                client.close()
        except Exception as exc:  # noqa: BLE001 (whatever the library raises means "no engine")
            log.debug("no container engine: %s", exc)
        gc.collect()
    return False


def _container() -> AbstractContextManager[str]:
    from testcontainers.core.container import DockerContainer

    @contextmanager
    def run() -> Iterator[str]:
        with DockerContainer(_CONTAINER_IMAGE).with_exposed_ports(_CONTAINER_PORT) as container:
            host, port = container.get_container_host_ip(), int(container.get_exposed_port(_CONTAINER_PORT))
            _wait_for_pong(host, port)
            yield f"redis://{host}:{port}"

    return run()


def _wait_for_pong(host: str, port: int) -> None:
    deadline = time.monotonic() + _CONTAINER_START_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail(f"the Redis container at {host}:{port} did not answer within {_CONTAINER_START_S:g} s")
