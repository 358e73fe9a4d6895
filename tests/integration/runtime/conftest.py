"""Runtimes on the session's Redis, under the test's own prefix."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from dynamo_redis.runtime import DistributedRuntime, Settings

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]


@pytest.fixture
async def open_runtime(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[OpenRuntime]:
    """Open a runtime, as one more process of the deployment; closed at the end of the test."""
    opened: list[DistributedRuntime] = []

    async def open_(**overrides: Any) -> DistributedRuntime:
        settings = {"redis_url": dynamo_redis_url, "prefix": dynamo_redis_prefix, "drain_s": 2, **overrides}
        runtime = DistributedRuntime(settings=Settings.load(**settings))
        opened.append(runtime)
        await runtime.start()
        return runtime

    yield open_
    for runtime in reversed(opened):
        await runtime.aclose()
