"""Metrics of an engine's own on its worker's `/metrics`: the names of `dynamo.common.backend.metrics`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from dynamo_redis.exposition import Family
from dynamo_redis.rate_limited_log import RateLimitedLog

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

log = logging.getLogger(__name__)

_KINDS: Final[Mapping[str, Literal["counter", "gauge", "histogram"]]] = {
    "counter": "counter",
    "histogram": "histogram",
}
"""Kinds that are shown as they are; the samples of all others are gauges."""


class EngineMetrics:
    """The worker's `/metrics`, for an engine. `auto_labels` tell whose metrics they are."""

    def __init__(self, auto_labels: Mapping[str, str]) -> None:
        self.auto_labels = dict(auto_labels)
        self._sources: list[Callable[[], Iterable[Metric]]] = []
        self._lines = RateLimitedLog(log)

    def register_prometheus_expfmt_callback(self, callback: Callable[[], str]) -> None:
        """Show the metrics that `callback` returns in Prometheus's text format. It must be quick."""
        from prometheus_client.parser import text_string_to_metric_families

        self._sources.append(lambda: text_string_to_metric_families(callback()))

    def register_prometheus_typed_callback(self, callback: Callable[[], Any]) -> None:
        """Do nothing: these are the same metrics in another form, for an exporter that is not here."""

    def families(self) -> list[Family]:
        """Return the metrics of now. Those whose callback raises are left out and named in the log."""
        found: list[Family] = []
        for source in self._sources:
            try:
                found += [_family(metric) for metric in source()]
            except Exception as exc:  # noqa: BLE001 - the callback is the engine's
                self._lines.log("the engine's metrics cannot be read: %r", exc)
        return found


def register_engine_registry(
    metrics: EngineMetrics,
    registry: CollectorRegistry,
    *,
    prefix_filters: list[str] | None = None,
    exclude_prefixes: list[str] | None = None,
) -> None:
    """Show the metrics of a registry whose names begin with one of `prefix_filters` and none of
    `exclude_prefixes`, with the `auto_labels`."""
    wanted, unwanted = tuple(prefix_filters or [""]), tuple(exclude_prefixes or [])

    def collect() -> Iterable[Metric]:
        for metric in registry.collect():
            if metric.name.startswith(wanted) and not metric.name.startswith(unwanted):
                metric.samples = [
                    sample._replace(labels={**metrics.auto_labels, **sample.labels})
                    for sample in metric.samples
                ]
                yield metric

    metrics._sources.append(collect)


def register_global_registry(
    metrics: EngineMetrics,
    *,
    engine_prefix: str,
    multiproc_only_prefixes: list[str] | None = None,
    exclude_prefixes: list[str] | None = None,
) -> None:
    """Show the engine's metrics of the process's registry; with `PROMETHEUS_MULTIPROC_DIR`, of all its
    processes."""
    from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

    registry = CollectorRegistry()
    try:
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    except ValueError:  # no directory of several processes is set
        registry = REGISTRY
    register_engine_registry(
        metrics,
        registry,
        prefix_filters=[engine_prefix, *(multiproc_only_prefixes or [])],
        exclude_prefixes=exclude_prefixes,
    )


def _family(metric: Metric) -> Family:
    kind = _KINDS.get(metric.type, "gauge")
    name = f"{metric.name}_total" if kind == "counter" else metric.name
    family = Family(name, kind, metric.documentation)
    family.samples = [
        (sample.name, sample.labels, sample.value)
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]
    return family
