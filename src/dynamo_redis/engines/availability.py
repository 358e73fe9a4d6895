"""The registration of a worker's instance according to its engine's health."""

from __future__ import annotations

import asyncio
import logging

from dynamo_redis.engines.base import Engine
from dynamo_redis.errors import StoreError
from dynamo_redis.runtime.endpoint import Endpoint

log = logging.getLogger(__name__)

_RETRY_S = 1.0
"""Seconds between two attempts to register while Redis does not answer."""


async def follow_health(endpoint: Endpoint, engine: Engine) -> None:
    """Unregister the instance while its engine is down, and register it again after. Runs until cancelled.

    Start this when the endpoint is served, and cancel it before the endpoint is unregistered for good.
    Requests that still arrive while the engine is down get the engine's own retryable error.
    """
    while True:
        await engine.wait_health(False)
        log.warning("the engine behind %s is down: its instance leaves the registry", endpoint.name)
        await endpoint.unregister_endpoint_instance()
        await engine.wait_health(True)
        while True:
            try:
                await endpoint.register_endpoint_instance()
                break
            except StoreError as exc:
                log.debug("could not register %s again yet: %s", endpoint.name, exc)
                await asyncio.sleep(_RETRY_S)
        log.info("the engine behind %s is back: its instance is registered again", endpoint.name)
