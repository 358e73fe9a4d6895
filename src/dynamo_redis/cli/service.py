"""What the long-running commands have in common: settings, log, event loop, runtime, shutdown."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_redis.cli import collection
from dynamo_redis.cli.options import load, setting_options
from dynamo_redis.cli.output import print_line
from dynamo_redis.config import PlaneSettings, RuntimeSettings, StoreSettings
from dynamo_redis.names import format_instance_id

if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime

Command = TypeVar("Command", bound=Callable[..., Any])

READY = "ready"
"""The first word of the line that a service prints on stdout once it serves. Nothing else goes there."""


def runtime_options(command: Command) -> Command:
    """All options of a process that has a runtime."""
    for group in (RuntimeSettings, PlaneSettings, StoreSettings):
        command = setting_options(group)(command)
    return command


def run_service(
    name: str, options: Mapping[str, Any], serve: Callable[[DistributedRuntime], Awaitable[None]]
) -> None:
    """Run `serve` with a runtime until SIGTERM or Ctrl-C, and close in order.

    Raises ConfigError for wrong settings and StoreError if Redis cannot be used at start.
    """
    from dynamo_redis.runtime.logging import configure_dynamo_logging
    from dynamo_redis.runtime.runtime import DistributedRuntime, Settings

    settings = Settings(
        store=load(StoreSettings, options),
        plane=load(PlaneSettings, options),
        runtime=load(RuntimeSettings, options),
    )

    async def main() -> None:
        runtime = DistributedRuntime(settings=settings)
        # Many workers may log to one place: each stands there under the id that `instances` lists.
        service_name = f"{name}-{format_instance_id(runtime.instance_id)}"
        configure_dynamo_logging(service_name=service_name, level=settings.runtime.log)
        async with runtime:
            runtime.handle_signals()
            await serve(runtime)

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main())


def announce_ready(what: str) -> None:
    """Tell who started this process that it serves: `ready http://0.0.0.0:8000`."""
    collection.resume()
    print_line(f"{READY} {what}")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
