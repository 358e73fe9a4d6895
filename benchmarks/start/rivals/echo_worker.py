"""An echo worker that runs on either runtime: `python echo_worker.py dynamo.runtime|dynamo_redis.runtime`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

runtime_module = importlib.import_module(sys.argv[1])


async def echo(request: Any) -> AsyncIterator[Any]:
    """Answer with the request, once."""
    yield request


@runtime_module.dynamo_worker()  # type: ignore[untyped-decorator]
async def main(runtime: Any) -> None:
    """Serve until told to stop."""
    await runtime.endpoint("bench.echo.generate").serve_endpoint(echo)


uvloop.run(main())
