"""The decorator that makes a coroutine function the main function of a worker process."""

from __future__ import annotations

import asyncio
import functools
import logging
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from dynamo_redis.config import unknown_settings
from dynamo_redis.errors import NoInstances, StoreUnavailable
from dynamo_redis.names import format_instance_id
from dynamo_redis.runtime.logging import configure_dynamo_logging
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.tracing import close_tracing, configure_tracing

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def dynamo_worker(
    enable_nats: bool | None = None,
) -> Callable[
    [Callable[Concatenate[DistributedRuntime, P], Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]
]:
    """Pass a runtime to a coroutine function: made from the settings, and closed when the function ends.

        @dynamo_worker()
        async def worker(runtime: DistributedRuntime) -> None:
            await runtime.endpoint("dynamo.backend.generate").serve_endpoint(handler)

        uvloop.run(worker())

    SIGTERM, SIGINT and SIGHUP shut the runtime down: `serve_endpoint` returns, and the worker ends with 0
    within `DYN_GRACEFUL_SHUTDOWN_S`. A program that waits for an instance, or for Redis, ends at once with
    exit code 1. A program that waits for anything else is cancelled when that time is nearly over, and ends
    with 1, too. Logs go to stderr at the level of `DYN_LOG`, unless the root logger has a handler already.
    Raises ConfigError for wrong settings.
    """
    if enable_nats is not None:
        warnings.warn("enable_nats has no effect: no NATS is used", DeprecationWarning, stacklevel=2)

    def decorate(
        main: Callable[Concatenate[DistributedRuntime, P], Awaitable[R]],
    ) -> Callable[P, Coroutine[Any, Any, R]]:
        @functools.wraps(main)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return await run_worker(DistributedRuntime, lambda runtime: main(runtime, *args, **kwargs))

        return run

    return decorate


async def run_worker(
    make_runtime: Callable[[], DistributedRuntime], main: Callable[[DistributedRuntime], Awaitable[R]]
) -> R:
    """Make a runtime, pass it to the main function of a worker process, and close it, as `dynamo_worker`
    describes."""
    if not logging.getLogger().handlers:
        configure_dynamo_logging()
    for sentence in unknown_settings().values():
        log.warning("%s", sentence)
    runtime = make_runtime()
    configure_tracing("dynamo-worker", format_instance_id(runtime.instance_id))
    runtime.handle_signals()
    try:
        try:
            await runtime.start()
        except StoreUnavailable as exc:
            if not runtime.is_shutting_down:
                raise
            log.info("ended by the shutdown: %s", exc)
            raise SystemExit(1) from None
        async with _ended_after_shutdown(runtime):
            return await main(runtime)
    finally:
        await runtime.aclose()
        await close_tracing()


@asynccontextmanager
async def _ended_after_shutdown(runtime: DistributedRuntime) -> AsyncIterator[None]:
    """Cancel the block if it goes on for too long after a shutdown; the process then ends with 1
    (SystemExit).

    The limit is half-way between the end of the requests, when `serve_endpoint` returns, and the shutdown's
    deadline.
    """
    task = asyncio.current_task()
    assert task is not None
    deadline = runtime.shutdown_deadline
    is_late = False

    async def watch() -> None:
        nonlocal is_late
        await runtime.wait_for_shutdown()
        total_s = deadline.total_s
        await asyncio.sleep(deadline.left_s - deadline.closing_s / 2)
        log.warning("the worker's main function has not ended with the shutdown (%g s): cancelled", total_s)
        is_late = True
        task.cancel()

    watcher = asyncio.create_task(watch(), name="end after shutdown")
    try:
        yield
    except NoInstances as exc:
        if not runtime.is_shutting_down:
            raise
        log.info("ended by the shutdown: %s", exc)
        raise SystemExit(1) from None
    except asyncio.CancelledError:
        if is_late and not task.uncancel():
            raise SystemExit(1) from None
        raise
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
