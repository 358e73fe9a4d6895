"""A worker's place in the registry follows its engine's health."""

from __future__ import annotations

import asyncio
import logging

from dynamo_redis.engines.base import Engine
from dynamo_redis.errors import StoreError
from dynamo_redis.runtime.endpoint import Endpoint

log = logging.getLogger(__name__)

_RETRY_S = 1.0
"""Between attempts to register while Redis is away."""


async def follow_health(endpoint: Endpoint, engine: Engine) -> None:
    """Take the instance out of the registry while its engine is down, and put it back. Runs until cancelled.

    To be started once the endpoint is served, and cancelled before it is unregistered for good. Requests that
    still arrive while the engine is down are answered by the engine's own retryable error.
    """
    while True:
        await engine.wait_health(False)
        log.warning("the engine behind %s is down: its instance leaves the registry", endpoint.name)
        await endpoint.unregister_endpoint_instance()
        await engine.wait_health(True)
        await _register(endpoint)
        log.info("the engine behind %s is back: its instance is registered again", endpoint.name)


async def _register(endpoint: Endpoint) -> None:
    while True:
        try:
            await endpoint.register_endpoint_instance()
        except StoreError as exc:
            log.debug("could not register %s again yet: %s", endpoint.name, exc)
            await asyncio.sleep(_RETRY_S)
        else:
            return
