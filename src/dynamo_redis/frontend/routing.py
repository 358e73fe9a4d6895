"""Clients of workers: by a policy, by a router in this process, or by a router service."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

from dynamo_redis.config import FrontendSettings, RouterSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.model import Answer, EndpointClient
from dynamo_redis.frontend.models import OpenClient
from dynamo_redis.names import EndpointName
from dynamo_redis.planes.context import Context
from dynamo_redis.router.base import BusyThresholds
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.router.service import RouterClient
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.selection import policy
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

OPEN_S: Final = 10.0
"""Longest wait for the router of a client by policy, in seconds."""


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
        async def open_router() -> KvRouter:
            chooses = policy(mode, random.Random())  # noqa: S311 - spreading load, no secret
            router = KvRouter(runtime, endpoint, router_settings, policy=chooses)
            await router.start()
            return router

        return PolicyClient(await runtime.endpoint(str(endpoint)).client(mode), open_router)

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


class PolicyClient:
    """A client that chooses by a policy. Requests with busy thresholds go by way of a router that counts the
    load of the workers, and has the same policy choose among those that are not busy.

    That router is opened with the first thresholds. Until it is open, no worker is busy.
    """

    def __init__(self, client: Client, open_router: Callable[[], Awaitable[KvRouter]]) -> None:
        """The client is closed with this one. `open_router` raises StoreError."""
        self.router: KvRouter | None = None
        """The open router, or None."""
        self._client = client
        self._open_router = open_router
        self._opening: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, "router of a client by policy")

    def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
        busy: BusyThresholds | None = None,
    ) -> Awaitable[Answer]:
        """As `EndpointClient.generate`."""
        if busy is not None:
            if self.router is not None:
                return self.router.generate(request, annotated, context, among=among, busy=busy)
            self._open_soon()
        return self._client.generate(request, annotated, context, among=among)

    def _open_soon(self) -> asyncio.Task[None]:
        async def open_() -> None:
            self.router = await self._open_router()
            await self.router.count_load()

        if self._opening is None:
            self._opening = asyncio.create_task(self._supervisor.run(open_), name="open router")
        return self._opening

    async def count_load(self) -> None:
        """As `EndpointClient.count_load`. Waits for `OPEN_S` at most."""
        await asyncio.wait({self._open_soon()}, timeout=OPEN_S)

    def instance_ids(self) -> list[int]:
        """As `Client.instance_ids`."""
        return self._client.instance_ids()

    def confirmed_instances(self) -> list[Instance]:
        """As `Client.confirmed_instances`."""
        return self._client.confirmed_instances()

    def members(self) -> list[Member]:
        """As `Client.members`."""
        return self._client.members()

    async def aclose(self) -> None:
        """Close the client and the router."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        if self.router is not None:
            await self.router.aclose()
        await self._client.aclose()


def router_of(client: EndpointClient | None) -> KvRouter | None:
    """Return the router in this process by which a client chooses, or None."""
    if isinstance(client, PolicyClient):
        return client.router
    return client if isinstance(client, KvRouter) else None
