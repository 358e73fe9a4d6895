"""The state of a process, as `/health` and `/metrics` show it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from dynamo_redis.exposition import Family, Source
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer
from dynamo_redis.runtime.serving import ServedEndpoint
from dynamo_redis.runtime.system.metrics import EndpointReading, endpoint_families, process_families
from dynamo_redis.store.base import Registry


class ProcessState:
    """The state of one runtime. For the event loop's thread."""

    def __init__(
        self,
        registry: Registry,
        endpoints: Callable[[], Iterable[ServedEndpoint]],
        server: Callable[[], RequestPlaneServer | None],
        client: Callable[[], RequestPlaneClient | None],
        sources: Iterable[Source],
        is_serving: Callable[[], bool],
        is_shutting_down: Callable[[], bool],
    ) -> None:
        """`endpoints` are those that the process serves, `server` is their server once there is one, and
        `sources` are the metrics of other parts of the process."""
        self._registry = registry
        self._endpoints = endpoints
        self._server = server
        self._client = client
        self._sources = sources
        self._is_serving = is_serving
        self._is_shutting_down = is_shutting_down
        self._started_at = time.monotonic()

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of `/health`: 200 while the process serves and each endpoint is ready."""
        endpoints = [served for served in self._endpoints() if not served.closed]
        reasons = [f"{served.instance.name}: {served.not_ready}" for served in endpoints if served.not_ready]
        if self._is_shutting_down():
            reasons.insert(0, "the process is shutting down")
        elif not self._is_serving():
            reasons.insert(0, "the process has not begun to serve yet")
        uptime_s = time.monotonic() - self._started_at
        body: dict[str, Any] = {
            "status": "notready" if reasons else "ready",
            "uptime": {"secs": int(uptime_s), "nanos": int(uptime_s % 1 * 1e9)},
            "endpoints": {
                self._short_name(served, endpoints): "notready" if served.not_ready else "ready"
                for served in endpoints
            },
            "registry": "connected" if self._registry.connected else "unreachable",
        }
        if self._registry.connected and self._registry.write_refusal is not None:
            body["registry"] = "refuses writes"
            body["registry_reason"] = self._registry.write_refusal
        if reasons:
            body["reasons"] = reasons
        return (503 if reasons else 200), body

    def _short_name(self, served: ServedEndpoint, endpoints: list[ServedEndpoint]) -> str:
        """Return the endpoint's own name, as Dynamo shows it, or its full name if another has the same."""
        name = served.instance.name
        names = [other.instance.name.endpoint for other in endpoints]
        return str(name) if names.count(name.endpoint) > 1 else name.endpoint

    def metrics(self) -> list[Family]:
        """Return the figures of now."""
        server, client = self._server(), self._client()
        worker_id = format_instance_id(self._registry.lease_id)
        readings = []
        for served in self._endpoints():
            name = served.instance.name
            stats = None if server is None else server.stats(name.subject(served.instance.instance_id))
            if stats is not None and not served.closed:
                readings.append(EndpointReading(name, served.metrics_labels, not served.not_ready, stats))
        uptime_s = time.monotonic() - self._started_at
        return [
            *endpoint_families(worker_id, readings),
            *process_families(worker_id, uptime_s, self._registry, client, server),
            *(family for source in tuple(self._sources) for family in source()),
        ]
