"""Metrics on their way to Prometheus's text format: the part that frontends, workers and routers share.

A part of a process describes its figures as families, on the event loop. The text is made in another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from dynamo_redis.histogram import HistogramReading

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Family:
    """One metric: all samples of one name. The name of a counter ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    samples: list[tuple[str, Mapping[str, str], float]] = field(default_factory=list)

    def add(self, value: float, labels: Mapping[str, str] | None = None) -> Family:
        """Add a sample; return the family."""
        self.samples.append((self.name, labels or {}, value))
        return self

    def add_histogram(self, reading: HistogramReading, labels: Mapping[str, str]) -> None:
        """Add the samples of a histogram."""
        for limit, count in zip((*reading.limits, None), reading.counts, strict=True):
            le = "+Inf" if limit is None else f"{limit:.15g}"
            self.samples.append((f"{self.name}_bucket", {**labels, "le": le}, count))
        self.samples.append((f"{self.name}_sum", labels, reading.total))
        self.samples.append((f"{self.name}_count", labels, reading.counts[-1]))


Source = Callable[[], Iterable[Family]]
"""Returns the figures of now. Called on the event loop; it must be quick, and must not raise."""


def render(families: Iterable[Family]) -> bytes:
    """Return the families, and the process's own use of CPU, memory and files, in Prometheus's text format.

    For any thread. Families of one name, as of several routers of a process, become one.
    """
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector

    merged: dict[str, Metric] = {}
    for family in families:
        metric = merged.get(family.name)
        if metric is None:
            # The library puts the ending of a counter's name there by itself.
            name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
            metric = merged[family.name] = Metric(name, family.description, family.kind)
        for sample_name, labels, value in family.samples:
            metric.add_sample(sample_name, dict(labels), value)

    class Families(Collector):
        def collect(self) -> Iterable[Metric]:
            return merged.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families())
    ProcessCollector(registry=registry)
    return generate_latest(registry)
