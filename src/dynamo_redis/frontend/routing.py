"""Clients of workers: by a policy, by a router in this process, or by a router service."""

from __future__ import annotations

from dynamo_redis.config import FrontendSettings, RouterSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.model import EndpointClient
from dynamo_redis.frontend.models import OpenClient
from dynamo_redis.names import EndpointName
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.router.service import RouterClient
from dynamo_redis.runtime.runtime import DistributedRuntime


def client_opener(
    runtime: DistributedRuntime, settings: FrontendSettings, router_settings: RouterSettings
) -> OpenClient:
    """Return the function that opens the client of an endpoint, by the settings. Raises ConfigError."""
    mode = settings.router_mode
    router_endpoint = settings.router_endpoint
    if router_endpoint is not None:
        if mode != "kv":
            raise ConfigError(
                f"DYN_ROUTER_ENDPOINT={router_endpoint!r} needs DYN_ROUTER_MODE=kv, which is {mode!r}: "
                "add --router-mode kv, or unset the endpoint"
            )
        EndpointName.parse(router_endpoint)

    async def by_policy(endpoint: EndpointName) -> EndpointClient:
        return await runtime.endpoint(str(endpoint)).client(mode)

    async def by_own_router(endpoint: EndpointName) -> EndpointClient:
        router = KvRouter(runtime, endpoint, router_settings)
        await router.start()
        return router

    async def by_router_service(endpoint: EndpointName) -> EndpointClient:
        assert router_endpoint is not None
        return await RouterClient.open(runtime, router_endpoint, endpoint)

    if mode != "kv":
        return by_policy
    return by_own_router if router_endpoint is None else by_router_service
