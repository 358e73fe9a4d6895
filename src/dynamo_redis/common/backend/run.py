"""The main function of a worker's program: the name of `dynamo.common.backend.run`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

from dynamo_redis.common.backend.engine import BaseEngine
from dynamo_redis.common.backend.worker import Worker, WorkerConfig

EngineFactory = Callable[[list[str] | None], Awaitable[tuple[BaseEngine, WorkerConfig]]]


def run(
    engine_cls: type[BaseEngine],
    argv: list[str] | None = None,
    engine_factory: EngineFactory | None = None,
) -> None:
    """Make an engine of the command line, and serve it until SIGTERM or SIGINT.

    Raises what `Worker.run` does. `engine_factory(argv)` is called in place of `engine_cls.from_args`.
    """

    async def main() -> None:
        engine, config = await (engine_factory or engine_cls.from_args)(argv)
        await Worker(engine, config).run()

    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32":
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
