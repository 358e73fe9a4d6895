"""A worker that greets each name of a request. Start as many as you like.

DYN_REDIS_URL=redis://localhost:6379 python examples/from_dynamo/hello_world/worker.py
"""

import logging
from collections.abc import AsyncIterator

import uvloop

from dynamo_redis.runtime import DistributedRuntime, dynamo_endpoint, dynamo_worker
from dynamo_redis.runtime.logging import configure_dynamo_logging

configure_dynamo_logging(service_name="hello")
log = logging.getLogger(__name__)


@dynamo_endpoint(str, str)
async def greet(request: str) -> AsyncIterator[str]:
    log.info("asked to greet %s", request)
    for name in request.split(","):
        yield f"Hello {name}!"


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    await runtime.endpoint("hello_world.backend.generate").serve_endpoint(greet)


if __name__ == "__main__":
    uvloop.run(main())
