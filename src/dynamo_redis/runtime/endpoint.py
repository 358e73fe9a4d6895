"""Endpoints, which workers serve and clients call, and the older ways to name them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from dynamo_redis.errors import StoreUnavailable
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.runtime.awaitables import started
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.handlers import AnyHandler
from dynamo_redis.runtime.service import StatsHandler
from dynamo_redis.runtime.serving import ServedEndpoint

log = logging.getLogger(__name__)


def note_ignored(call: str, arguments: Mapping[str, object]) -> None:
    """Log a warning for each argument that is not known here, as one of a later release of
    `dynamo.runtime`."""
    for name in arguments:
        log.warning("%s: the argument %s is not known here and has no effect", call, name)


class Host(Protocol):
    """The part of the runtime that an endpoint uses."""

    async def serve(
        self,
        name: EndpointName,
        handler: AnyHandler,
        *,
        graceful_shutdown: bool,
        stats_handler: StatsHandler | None = None,
        is_bidirectional: bool = False,
        metrics_labels: list[tuple[str, str]] | None = None,
        health_check_payload: Any = None,
    ) -> ServedEndpoint: ...

    def served(self, name: EndpointName) -> ServedEndpoint | None: ...

    def open_client(self, name: EndpointName, router_mode: str) -> Coroutine[Any, Any, Client]: ...

    async def wait_for_shutdown(self) -> None: ...

    @property
    def is_shutting_down(self) -> bool: ...

    @property
    def instance_id(self) -> InstanceId: ...


class Endpoint:
    """`namespace.component.endpoint` of one runtime."""

    def __init__(self, host: Host, name: EndpointName) -> None:
        self._host = host
        self.name = name

    def __repr__(self) -> str:
        return f"<Endpoint {self.name}>"

    def serve_endpoint(
        self,
        handler: AnyHandler,
        graceful_shutdown: bool = True,
        metrics_labels: list[tuple[str, str]] | None = None,
        health_check_payload: dict[str, Any] | None = None,
        stats_handler: StatsHandler | None = None,
        **later: object,
    ) -> asyncio.Task[None]:
        """Serve until the runtime shuts down; then leave the registry and let requests under way finish.

        Raises StoreError if the endpoint cannot be registered, ConfigError if there is no address to
        advertise.

        Args:
            handler: takes `(request)` or `(request, context)`. An async generator function answers with its
                items, a coroutine function with one item.
            graceful_shutdown: False kills requests under way at the shutdown.
            metrics_labels: labels and their values, which the endpoint's metrics get beside their own. Names
                that are no label names of Prometheus, or are there already, raise ValueError.
            health_check_payload: with `DYN_HEALTH_CHECK_ENABLED`, a request that the handler gets while it is
                idle. Until it answers, callers do not choose the instance, and `/health` says so.
            stats_handler: returns what the endpoint adds to its stats, any JSON value of up to 256 KiB, as
                `data`. Called for each `dynamo-redis stats` and `Client.scrape_stats`.
            later: arguments of later releases of `dynamo.runtime`, named in the log, without effect.
        """
        note_ignored("serve_endpoint", later)
        return started(
            self._serve(
                handler,
                graceful_shutdown,
                stats_handler=stats_handler,
                metrics_labels=metrics_labels,
                health_check_payload=health_check_payload,
            )
        )

    def serve_bidirectional_endpoint(
        self,
        handler: AnyHandler,
        graceful_shutdown: bool = True,
        metrics_labels: list[tuple[str, str]] | None = None,
        **later: object,
    ) -> asyncio.Task[None]:
        """Serve as `serve_endpoint`, an endpoint that gets a stream of messages and answers with a stream.

        The handler is an async generator function that takes `(request_stream)` or `(request_stream,
        context)`. `request_stream` yields the caller's messages as they come, and ends when the caller has
        sent the last one; the answer may go on. An error of the caller's source is raised from it. Callers
        use `Client.bidirectional`.
        """
        note_ignored("serve_bidirectional_endpoint", later)
        return started(
            self._serve(handler, graceful_shutdown, is_bidirectional=True, metrics_labels=metrics_labels)
        )

    async def _serve(
        self,
        handler: AnyHandler,
        graceful_shutdown: bool,
        *,
        stats_handler: StatsHandler | None = None,
        is_bidirectional: bool = False,
        metrics_labels: list[tuple[str, str]] | None = None,
        health_check_payload: dict[str, Any] | None = None,
    ) -> None:
        """Serve until the shutdown."""
        try:
            served = await self._host.serve(
                self.name,
                handler,
                graceful_shutdown=graceful_shutdown,
                stats_handler=stats_handler,
                is_bidirectional=is_bidirectional,
                metrics_labels=metrics_labels,
                health_check_payload=health_check_payload,
            )
        except (StoreUnavailable, RuntimeError) as exc:
            if not self._host.is_shutting_down:
                raise
            log.info("the shutdown came before %s was served: %s", self.name, exc)
            return
        try:
            await self._host.wait_for_shutdown()
        finally:
            await served.unregister()

    async def start_serving(
        self,
        handler: AnyHandler,
        graceful_shutdown: bool = True,
        *,
        metrics_labels: list[tuple[str, str]] | None = None,
        health_check_payload: dict[str, Any] | None = None,
        stats_handler: StatsHandler | None = None,
    ) -> ServedEndpoint:
        """Serve as `serve_endpoint` does, but return as soon as callers can find the endpoint."""
        return await self._host.serve(
            self.name,
            handler,
            graceful_shutdown=graceful_shutdown,
            stats_handler=stats_handler,
            metrics_labels=metrics_labels,
            health_check_payload=health_check_payload,
        )

    def unregister_endpoint_instance(self) -> asyncio.Task[None]:
        """Take this process's instance out of the registry, as while its engine sleeps.

        The instance still answers requests that arrive. Raises RuntimeError if it is not served here.
        """
        return started(self._served_here().leave())

    def register_endpoint_instance(self) -> asyncio.Task[None]:
        """Put this process's instance back into the registry. Raises RuntimeError, StoreError."""
        return started(self._served_here().announce())

    def _served_here(self) -> ServedEndpoint:
        served = self._host.served(self.name)
        if served is None:
            raise RuntimeError(f"{self.name} is not served by this process")
        return served

    def client(self, router_mode: str | None = None) -> asyncio.Task[Client]:
        """Return a client of this endpoint, as soon as it has the list of instances.

        `router_mode` is the policy of the client's `generate`: round_robin (default), random, p2c or
        least_loaded.
        Raises ConfigError for an unknown mode, StoreError if the registry cannot be read.
        """
        return started(self._host.open_client(self.name, router_mode or "round_robin"))

    @property
    def host(self) -> Host:
        """The runtime that the endpoint belongs to."""
        return self._host

    def connection_id(self) -> int:
        """Return the id of this process's instance of the endpoint."""
        return self._host.instance_id


class Component:
    """`namespace.component`: the older way to an endpoint."""

    def __init__(self, host: Host, namespace: str, component: str) -> None:
        self._host = host
        self._namespace = namespace
        self._component = component

    async def create_service(self) -> None:
        """Do nothing: an endpoint registers itself. Older workers call this."""

    def endpoint(self, name: str) -> Endpoint:
        """Return the component's endpoint of this name."""
        return Endpoint(self._host, EndpointName(self._namespace, self._component, name))


class Namespace:
    """A namespace: the older way to a component."""

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        self._name = name

    def component(self, name: str) -> Component:
        """Return the namespace's component of this name."""
        return Component(self._host, self._name, name)
