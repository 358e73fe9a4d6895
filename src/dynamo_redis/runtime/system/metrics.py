"""The metrics of a runtime: its endpoints, its registry and its request plane. Names and labels are those of
Dynamo's component metrics, where Dynamo has the same figure.

Nothing is counted for it: requests are counted anyway for the stats, and the figures become metrics when they
are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_redis.exposition import Family
from dynamo_redis.histogram import HistogramReading
from dynamo_redis.names import EndpointName
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer
from dynamo_redis.planes.stats import DURATION_BUCKETS_S, EndpointStats
from dynamo_redis.runtime.system.labels import Labels
from dynamo_redis.store.base import Registry


@dataclass(frozen=True, slots=True)
class EndpointReading:
    """The figures of one endpoint. `labels` are the user's."""

    name: EndpointName
    labels: Labels
    is_ready: bool
    stats: EndpointStats


def endpoint_families(worker_id: str, endpoints: Sequence[EndpointReading]) -> list[Family]:
    """Return the figures of a process's endpoints."""
    requests = Family("dynamo_component_requests_total", "counter", "Requests that have ended")
    errors = Family("dynamo_component_errors_total", "counter", "Requests that ended with an error")
    cancellations = Family(
        "dynamo_component_cancellation_total", "counter", "Requests whose caller stopped reading, or left"
    )
    in_flight = Family("dynamo_component_inflight_requests", "gauge", "Requests admitted and not ended")
    ready = Family("dynamo_redis_endpoint_ready", "gauge", "1 while callers may choose the instance")
    durations = Family(
        "dynamo_component_request_duration_seconds",
        "histogram",
        "Seconds from the start of the handler to the end of the answer",
    )
    for endpoint in endpoints:
        stats = endpoint.stats
        labels = {
            "dynamo_namespace": endpoint.name.namespace,
            "dynamo_component": endpoint.name.component,
            "dynamo_endpoint": endpoint.name.endpoint,
            "worker_id": worker_id,
            **dict(endpoint.labels),
        }
        requests.add(stats.request_count, labels)
        for code, count in stats.error_counts.items():
            errors.add(count, {**labels, "error_type": code})
        cancellations.add(stats.cancelled_count, labels)
        in_flight.add(stats.in_flight_count, labels)
        ready.add(endpoint.is_ready, labels)
        durations.add_histogram(
            HistogramReading(DURATION_BUCKETS_S, stats.duration_counts, stats.processing_s), labels
        )
    return [requests, errors, cancellations, in_flight, ready, durations]


def process_families(
    worker_id: str,
    uptime_s: float,
    registry: Registry,
    client: RequestPlaneClient | None,
    server: RequestPlaneServer | None,
) -> list[Family]:
    """Return the figures of a process's runtime: its registry, and its side of the request plane."""
    own = {"worker_id": worker_id}
    connections = Family("dynamo_redis_plane_connections", "gauge", "Open connections of the request plane")
    trips = Family(
        "dynamo_redis_registry_command_duration_seconds", "histogram", "Seconds to the answer of Redis"
    )
    if registry.trips is not None:
        trips.add_histogram(registry.trips, own)
    under_way = Family("dynamo_request_plane_inflight", "gauge", "Requests to other processes under way")
    if client is not None:
        under_way.add(client.pending_count, own)
        connections.add(client.connection_count, {**own, "side": "client"})
    if server is not None:
        connections.add(server.connection_count, {**own, "side": "server"})
    return [
        Family("dynamo_component_uptime_seconds", "gauge", "Seconds since the start of the runtime").add(
            uptime_s, own
        ),
        Family("dynamo_redis_registry_connected", "gauge", "1 while Redis answers").add(
            registry.connected, own
        ),
        Family("dynamo_redis_registry_refuses_writes", "gauge", "1 while Redis takes no writes").add(
            registry.write_refusal is not None, own
        ),
        Family("dynamo_redis_registry_outages_total", "counter", "Times that Redis ceased to answer").add(
            registry.outages, own
        ),
        Family("dynamo_redis_lease_losses_total", "counter", "Times that the lease was lost").add(
            registry.lease_losses, own
        ),
        trips,
        under_way,
        connections,
    ]
