"""The decorator that turns a coroutine function into a worker process's main."""

from __future__ import annotations

import asyncio
import functools
import logging
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from dynamo_redis.runtime.logging import configure_dynamo_logging
from dynamo_redis.runtime.runtime import DistributedRuntime

P = ParamSpec("P")
R = TypeVar("R")


def dynamo_worker(
    enable_nats: bool | None = None,
) -> Callable[
    [Callable[Concatenate[DistributedRuntime, P], Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]
]:
    """Give a coroutine function a runtime, made from the settings and closed in order at its end.

        @dynamo_worker()
        async def worker(runtime: DistributedRuntime) -> None:
            await runtime.endpoint("dynamo.backend.generate").serve_endpoint(handler)

        uvloop.run(worker())

    SIGTERM and SIGINT shut the runtime down, so `serve_endpoint` returns and the worker ends cleanly. Logs go
    to stderr as `DYN_LOG` says, unless the program has given the root logger a handler before. Raises
    ConfigError for wrong settings.
    """
    if enable_nats is not None:
        warnings.warn("enable_nats has no effect: no NATS is used", DeprecationWarning, stacklevel=2)

    def decorate(
        main: Callable[Concatenate[DistributedRuntime, P], Awaitable[R]],
    ) -> Callable[P, Coroutine[Any, Any, R]]:
        @functools.wraps(main)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not logging.getLogger().handlers:
                configure_dynamo_logging()
            async with DistributedRuntime(asyncio.get_running_loop()) as runtime:
                runtime.handle_signals()
                return await main(runtime, *args, **kwargs)

        return run

    return decorate
