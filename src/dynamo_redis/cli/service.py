"""The common part of the long-running commands: settings, log, event loop, runtime, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_redis.cli import collection
from dynamo_redis.cli.connect import note_chosen_deployment
from dynamo_redis.cli.options import load, setting_options
from dynamo_redis.cli.output import print_line
from dynamo_redis.config import (
    EventSettings,
    PlaneSettings,
    RuntimeSettings,
    StoreSettings,
    SystemSettings,
    TracingSettings,
    unknown_settings,
)
from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.names import format_instance_id

if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime

log = logging.getLogger(__name__)

Command = TypeVar("Command", bound=Callable[..., Any])

MAX_OPEN_FILES = 65_536
"""A service raises its limit of open files to this, or to the hard limit: many shells set 1,024."""

READY = "ready"
"""The first word of the line that a service prints on stdout once it serves: its only output there."""


def runtime_options(command: Command) -> Command:
    """Decorate a command with all options of a process that has a runtime."""
    for group in (
        RuntimeSettings,
        SystemSettings,
        TracingSettings,
        PlaneSettings,
        EventSettings,
        StoreSettings,
    ):
        command = setting_options(group)(command)
    return command


def run_service(
    name: str, options: Mapping[str, Any], serve: Callable[[DistributedRuntime], Awaitable[None]]
) -> None:
    """Run `serve` with a runtime until SIGTERM or Ctrl-C, and close the runtime.

    With `--wait` (DYN_WAIT_FOR_REDIS) it waits for Redis at the start.

    Raises ConfigError for wrong settings and StoreError if Redis cannot be used at start.
    """
    from dynamo_redis.runtime.logging import configure_dynamo_logging
    from dynamo_redis.runtime.runtime import DistributedRuntime, Settings
    from dynamo_redis.runtime.tracing import close_tracing, configure_tracing

    note_chosen_deployment(options)
    settings = Settings(
        store=load(StoreSettings, options),
        plane=load(PlaneSettings, options),
        runtime=load(RuntimeSettings, options),
        events=load(EventSettings, options),
        system=load(SystemSettings, options),
    )
    tracing = load(TracingSettings, options)

    raise_file_limit()

    async def main() -> None:
        runtime = DistributedRuntime(settings=settings)
        # Many workers may log to one place: the log names each by the id that `instances` lists.
        instance_id = format_instance_id(runtime.instance_id)
        service_name = f"{name}-{instance_id}"
        configure_dynamo_logging(service_name=service_name, settings=settings.runtime)
        configure_tracing(f"dynamo-{name}", instance_id, settings=tracing)
        for sentence in unknown_settings().values():
            log.warning("%s", sentence)
        runtime.handle_signals()  # before it starts: it may have to wait for Redis
        try:
            await runtime.start()
        except StoreUnavailable:
            if runtime.is_shutting_down:
                return
            raise
        else:
            await serve(runtime)
        finally:
            await runtime.aclose()
            await close_tracing()

    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32":
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def announce_ready(what: str) -> None:
    """Print the line that tells the parent process that this one serves: `ready http://0.0.0.0:8000`."""
    collection.resume()
    print_line(f"{READY} {what}")


def raise_file_limit() -> None:
    """Raise the limit of open files of this process and its children, up to `MAX_OPEN_FILES`."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the system has a lower maximum
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
