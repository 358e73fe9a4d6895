"""Shared by these tests: commands run in this process, and runtimes, on a registry of the test's own."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.cli.app import run
from dynamo_redis.runtime import DistributedRuntime, Settings

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]


@dataclass(frozen=True)
class Done:
    """The outcome of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> list[dict[str, object]]:
        assert self.code == 0, self.err
        found = json.loads(self.out)
        assert isinstance(found, list)
        return found


Cli = Callable[..., Done]


@pytest.fixture
def environment(
    dynamo_redis_url: str, dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The commands' settings, from this environment alone."""
    monkeypatch.setenv("DYN_REDIS_URL", dynamo_redis_url)
    monkeypatch.setenv("DYN_REDIS_PREFIX", dynamo_redis_prefix)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    ours = logging.getLogger("dynamo_redis")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def cli(environment: None, restored_logging: None, capfdbinary: pytest.CaptureFixture[bytes]) -> Cli:
    """Run a command in this process."""

    def call(*arguments: str) -> Done:
        capfdbinary.readouterr()
        code = run(arguments)
        out, err = capfdbinary.readouterr()
        return Done(code, out.decode(errors="surrogateescape"), err.decode())

    return call


@pytest.fixture
async def open_runtime(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[OpenRuntime]:
    """Open a runtime, as one more process of the deployment; closed at the end of the test."""
    opened: list[DistributedRuntime] = []

    async def open_(**overrides: Any) -> DistributedRuntime:
        here = {"redis_url": dynamo_redis_url, "prefix": dynamo_redis_prefix}
        # A call that is not read has one try to connect: on a busy machine that takes its time.
        settings = {**here, "drain_s": 2, "connect_timeout_s": 30, **overrides}
        runtime = DistributedRuntime(settings=Settings.load(**settings))
        opened.append(runtime)
        await runtime.start()
        return runtime

    yield open_
    for runtime in reversed(opened):
        await runtime.aclose()
