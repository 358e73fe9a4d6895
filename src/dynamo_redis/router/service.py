"""A router that is a service of its own: its endpoints, and the client by which frontends use it.

    <ns>.router.generate        a generate request → the worker's answer, streamed through
    <ns>.router.best_worker_id  `{"token_ids": […]}` → one item, see `answering.describe_choice`

`generate` takes a generate request with one more key, `routing`, a map. `endpoint` is the workers' endpoint,
as a check; `among` are the instances to choose among; `busy`, if present, has the thresholds of the model, by
the names of `BusyThresholds`.

`best_worker_id` books nothing, unless the request has `"hold": true`. Then the answer stays open after its
item, and the booking lasts until the caller ends the call or is gone, or the deadline passes. The caller
sends the request to the worker itself.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Collection
from dataclasses import asdict, fields
from typing import Any

from dynamo_redis.errors import (
    CannotConnect,
    ConnectionLost,
    Draining,
    EndpointNotFound,
    HandlerFailed,
    InstanceRemoved,
    InvalidRequest,
    NoInstances,
    NotAccepted,
    PlaneError,
)
from dynamo_redis.names import EndpointName
from dynamo_redis.planes.context import Context
from dynamo_redis.router.answering import describe_choice
from dynamo_redis.router.base import BusyThresholds
from dynamo_redis.router.kv_router import KvRouter
from dynamo_redis.router.prompts import token_ids_of
from dynamo_redis.runtime.call import Call
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.route import Hop
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.selection import Policy, policy
from dynamo_redis.runtime.serving import ServedEndpoint

log = logging.getLogger(__name__)

COMPONENT = "router"

_UNREACHABLE = (CannotConnect, ConnectionLost, NotAccepted, Draining, EndpointNotFound)
"""Failures of a worker that a caller would take for failures of the router."""


class RouterService:
    """The two endpoints of a router. Handlers are methods."""

    def __init__(self, router: KvRouter) -> None:
        self._router = router
        self._among: frozenset[int] | None = None

    async def serve(self, runtime: DistributedRuntime, component: str = COMPONENT) -> list[ServedEndpoint]:
        """Open both, in the namespace of the workers. Raises StoreError, ConfigError."""
        namespace = self._router.endpoint.namespace
        handlers = {"generate": self.generate, "best_worker_id": self.best_worker_id}
        return [
            await runtime.endpoint(f"{namespace}.{component}.{name}").start_serving(handler)
            for name, handler in handlers.items()
        ]

    async def generate(self, request: Any, context: Context) -> AsyncGenerator[Any]:
        """Forward a request to the worker that the router chooses, and its answer back."""
        token_ids_of(request)
        routing = request.pop("routing", None) or {}
        if not isinstance(routing, dict):
            raise InvalidRequest("routing must be a map")
        wanted = routing.get("endpoint")
        if wanted is not None and wanted != str(self._router.endpoint):
            raise InvalidRequest(
                f"this router chooses among {self._router.endpoint}, not among {wanted}: start another with "
                f"--endpoint {wanted}, and let the frontend that serves that model use it"
            )
        among = routing.get("among")
        if among is not None:
            if not isinstance(among, list) or not all(type(instance_id) is int for instance_id in among):
                raise InvalidRequest("routing.among must be a list of instance ids")
            among = frozenset(among)
            if among != self._among:
                self._among = among
            among = self._among  # the same object for the same ids: their workers are found again by it
        busy = _thresholds(routing.get("busy"))
        is_answered = False
        try:
            call = await self._router.generate(request, False, context, among=among, busy=busy)
            async for item in call:
                is_answered = True
                yield item
        except _UNREACHABLE as exc:
            if is_answered:
                raise InstanceRemoved(f"the worker was lost while answering: {exc}") from exc
            raise NoInstances(f"no worker took the request: {exc}") from exc

    async def best_worker_id(self, request: Any, context: Context) -> AsyncGenerator[Any]:
        """Answer with the worker that would be chosen; with `hold`, book it until the caller ends the
        call."""
        token_ids = token_ids_of(request)
        if not request.get("hold"):
            choice = await self._router.best_worker(token_ids, request=request)
            yield describe_choice(choice, self._router)
            return
        async with self._router.reserve(request, context) as choice:
            yield describe_choice(choice, self._router)
            await context.async_killed_or_stopped()


def _thresholds(given: Any) -> BusyThresholds | None:
    """Read the thresholds that a frontend sends; names of later releases are ignored. Raises
    InvalidRequest."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InvalidRequest("routing.busy must be a map of thresholds")
    thresholds = BusyThresholds()
    for field in fields(BusyThresholds):
        value = given.get(field.name)
        if value is not None and (type(value) not in (int, float) or not value >= 0):
            raise InvalidRequest(f"routing.busy.{field.name} must be a number that is not negative")
        setattr(thresholds, field.name, value)
    return thresholds


class RouterClient:
    """Takes the place of a client of the workers' endpoint; a router service chooses, and this process keeps
    no index.

    While no router can be reached, workers are chosen here, by load: this costs cache hits, but no request
    fails.
    """

    def __init__(self, routers: Client, workers: Client) -> None:
        """Both clients are closed with this one."""
        self._routers = routers
        self._workers = workers
        self._select: Policy = policy("p2c", random.Random())  # noqa: S311 - spreading load, no secret
        self._is_routed = True

    @classmethod
    async def open(
        cls, runtime: DistributedRuntime, router_endpoint: str, endpoint: EndpointName
    ) -> RouterClient:
        """Open clients of both endpoints. Raises ConfigError for a wrong name of an endpoint, StoreError."""
        routers = await runtime.endpoint(router_endpoint).client()
        try:
            workers = await runtime.endpoint(str(endpoint)).client()
        except BaseException:
            await routers.aclose()
            raise
        return cls(routers, workers)

    async def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
        busy: BusyThresholds | None = None,
    ) -> Call:
        """As `KvRouter.generate`, through a router. Workers that are chosen here are never busy."""
        routers, workers = self._routers.dispatcher, self._workers.dispatcher
        is_routed = bool(routers.view.candidates)
        if is_routed != self._is_routed:
            self._is_routed = is_routed
            if is_routed:
                log.info("a router can be reached again")
            else:
                log.warning("no router can be reached: workers are chosen by load")
        if not is_routed:
            return Call(workers, self._select, request, bool(annotated), context, among)
        routing: dict[str, Any] = {
            "endpoint": str(workers.view.name),
            "among": None if among is None else sorted(among),
        }
        if busy is not None:
            routing["busy"] = asdict(busy)
        route = _ServiceRoute(routers, workers, self._select, among)
        request = {**request, "routing": routing}
        return Call(routers, self._select, request, bool(annotated), context, route=route)

    async def count_load(self) -> None:
        """Do nothing: the router service counts the load."""

    def instance_ids(self) -> list[int]:
        """As `Client.instance_ids`, of the workers."""
        return self._workers.instance_ids()

    def confirmed_instances(self) -> list[Instance]:
        """As `Client.confirmed_instances`, of the workers."""
        return self._workers.confirmed_instances()

    def members(self) -> list[Member]:
        """As `Client.members`, of the workers."""
        return self._workers.members()

    async def aclose(self) -> None:
        """Close both clients."""
        await self._routers.aclose()
        await self._workers.aclose()


class _ServiceRoute:
    """A `Route` over routers; once none of them can be reached, over the workers themselves."""

    __slots__ = ("_among", "_is_bypassing", "_may_bypass", "_routers", "_select", "_workers")

    def __init__(
        self, routers: Dispatcher, workers: Dispatcher, select: Policy, among: Collection[int] | None
    ) -> None:
        """`among` are the ids of the workers to choose from, if a router is bypassed."""
        self._routers = routers
        self._workers = workers
        self._select = select
        self._among = among
        self._may_bypass = False
        self._is_bypassing = False

    def failed(self, member: Member, error: PlaneError, *, was_answered: bool) -> bool:
        """As `Route.failed`. Raises InstanceRemoved if the router that passed an answer on was lost."""
        if self._is_bypassing:
            self._workers.note_failure(member, error)
            return True
        if isinstance(error, HandlerFailed):
            return False  # a worker's error, passed on: the router has tried others if that could help
        # A router that answers that all workers are busy, or gone, is right: it is not bypassed.
        self._may_bypass = isinstance(error, _UNREACHABLE)
        self._routers.note_failure(member, error)
        if self._may_bypass and was_answered:
            raise InstanceRemoved(
                f"the router service that passed the answer on was lost: {error}"
            ) from error
        return True

    async def choose_again(self, tried: set[int], request: Any) -> Hop:
        """As `Route.choose_again`."""
        if not self._is_bypassing:
            left = [member for member in self._routers.view.candidates if member.instance_id not in tried]
            if left:
                return Hop(self._routers, self._select(left), request)
            if not self._may_bypass:
                raise NoInstances("no other router can be reached")
            self._is_bypassing = True
        return Hop(self._workers, self._workers.choose(self._select, tried, self._among), request)

    def ended(self) -> None:
        """Do nothing: the router ends the booking when its call ends."""
