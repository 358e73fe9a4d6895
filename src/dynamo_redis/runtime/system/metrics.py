"""The text of `/metrics`. Names and labels are those of Dynamo's component metrics.

Nothing is counted for it: requests are counted anyway for the stats, and the figures become metrics when they
are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from dynamo_redis.names import EndpointName
from dynamo_redis.planes.stats import DURATION_BUCKETS_S, EndpointStats
from dynamo_redis.runtime.system.labels import Labels

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class EndpointReading:
    """The figures of one endpoint. `labels` are the user's."""

    name: EndpointName
    labels: Labels
    is_ready: bool
    stats: EndpointStats


@dataclass(frozen=True, slots=True)
class Reading:
    """The figures of a process."""

    worker_id: str
    uptime_s: float
    is_connected: bool
    endpoints: Sequence[EndpointReading]


def render(reading: Reading) -> bytes:
    """Return the metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Readings(reading))
    return generate_latest(registry)


class _Readings(Collector):
    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of the reading."""
        reading = self._reading
        own = {"worker_id": reading.worker_id}
        uptime = Metric("dynamo_component_uptime_seconds", "Seconds since the start of the runtime", "gauge")
        uptime.add_sample(uptime.name, own, reading.uptime_s)
        connected = Metric("dynamo_redis_registry_connected", "1 while Redis answers", "gauge")
        connected.add_sample(connected.name, own, float(reading.is_connected))
        requests = Metric("dynamo_component_requests", "Requests that have ended", "counter")
        errors = Metric("dynamo_component_errors", "Requests that ended with an error", "counter")
        cancellations = Metric(
            "dynamo_component_cancellation", "Requests whose caller stopped reading, or left", "counter"
        )
        in_flight = Metric("dynamo_component_inflight_requests", "Requests admitted and not ended", "gauge")
        ready = Metric("dynamo_redis_endpoint_ready", "1 while callers may choose the instance", "gauge")
        durations = Metric(
            "dynamo_component_request_duration_seconds",
            "Seconds from the start of the handler to the end of the answer",
            "histogram",
        )
        for endpoint in reading.endpoints:
            stats = endpoint.stats
            labels = {
                "dynamo_namespace": endpoint.name.namespace,
                "dynamo_component": endpoint.name.component,
                "dynamo_endpoint": endpoint.name.endpoint,
                **own,
                **dict(endpoint.labels),
            }
            requests.add_sample(f"{requests.name}_total", labels, stats.request_count)
            for code, count in stats.error_counts.items():
                errors.add_sample(f"{errors.name}_total", {**labels, "error_type": code}, count)
            cancellations.add_sample(f"{cancellations.name}_total", labels, stats.cancelled_count)
            in_flight.add_sample(in_flight.name, labels, stats.in_flight_count)
            ready.add_sample(ready.name, labels, float(endpoint.is_ready))
            for limit_s, count in zip((*DURATION_BUCKETS_S, None), stats.duration_counts, strict=True):
                le = "+Inf" if limit_s is None else str(limit_s)
                durations.add_sample(f"{durations.name}_bucket", {**labels, "le": le}, count)
            durations.add_sample(f"{durations.name}_sum", labels, stats.processing_s)
            durations.add_sample(f"{durations.name}_count", labels, stats.duration_counts[-1])
        return [uptime, connected, requests, errors, cancellations, in_flight, ready, durations]
