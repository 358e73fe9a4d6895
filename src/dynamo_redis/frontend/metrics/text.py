"""The text of a frontend's `/metrics`, with the names of Dynamo's `dynamo_frontend_…`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from dynamo_redis.frontend.metrics.recording import ErrorType, FrontendMetrics, ModelRecord
from dynamo_redis.histogram import HistogramReading

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_HISTOGRAMS: Final = (
    ("request_duration_seconds", "Seconds from the request to the end of its answer"),
    ("time_to_first_token_seconds", "Seconds from the request to the first item of its answer"),
    ("inter_token_latency_seconds", "Seconds between two items of an answer"),
    ("input_sequence_tokens", "Tokens of a prompt"),
    ("output_sequence_tokens", "Tokens of an answer"),
    ("cached_tokens", "Tokens of a prompt that the worker had in its cache"),
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as its cards describe it."""

    """A model as its cards describe it."""
    name: str
    context_length: int
    kv_block_size: int
    migration_limit: int
    instance_count: int


@dataclass(frozen=True, slots=True)
class ModelReading:
    """The counts of a model at one moment."""

    requests: Mapping[tuple[str, str, str, ErrorType], int]
    in_flight_count: int
    queued_count: int
    answer_token_count: int
    migrations: Mapping[str, int]
    histograms: Sequence[HistogramReading]
    """In the order of their names above."""

    @classmethod
    def of(cls, record: ModelRecord) -> ModelReading:
        """Read the counts of now."""
        histograms = (
            record.durations_s, record.first_token_s, record.token_gaps_s, record.prompt_tokens,
            record.answer_tokens, record.cached_tokens,
        )  # fmt: skip
        return cls(
            requests=dict(record.requests),
            in_flight_count=record.in_flight_count,
            queued_count=record.queued_count,
            answer_token_count=record.answer_token_count,
            migrations=dict(record.migrations),
            histograms=[histogram.read() for histogram in histograms],
        )


@dataclass(frozen=True, slots=True)
class FrontendReading:
    """The figures of a frontend at one moment."""

    models: Mapping[str, ModelReading]
    served: Sequence[ServedModel]
    refused: Mapping[tuple[str, ErrorType], int]
    disconnected_count: int
    is_connected: bool

    @classmethod
    def of(
        cls, metrics: FrontendMetrics, served: Sequence[ServedModel], *, is_connected: bool
    ) -> FrontendReading:
        """Read the figures of now. For the event loop's thread."""
        return cls(
            models={name: ModelReading.of(record) for name, record in metrics.models.items()},
            served=served,
            refused=dict(metrics.refused),
            disconnected_count=metrics.disconnected_count,
            is_connected=is_connected,
        )


def render(reading: FrontendReading) -> bytes:
    """Return the metrics in Prometheus's text format. For any thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Readings(reading))
    return generate_latest(registry)


class _Readings(Collector):
    def __init__(self, reading: FrontendReading) -> None:
        self._reading = reading

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of the reading."""
        return [*self._requests(), *self._histograms(), *self._models()]

    def _requests(self) -> Iterable[Metric]:
        reading = self._reading
        requests = _metric("requests", "Requests that have ended", "counter")
        in_flight = _metric("inflight_requests", "Requests under way", "gauge")
        queued = _metric("queued_requests", "Requests without an item of their answer yet", "gauge")
        tokens = _metric("output_tokens", "Tokens of answers that have ended", "counter")
        migrations = _metric("model_migration", "Answers that went on at another worker", "counter")
        for name, model in reading.models.items():
            for (endpoint, request_type, status, kind), count in model.requests.items():
                labels = {
                    "model": name, "endpoint": endpoint, "request_type": request_type, "status": status,
                    "error_type": kind,
                }  # fmt: skip
                requests.add_sample(f"{requests.name}_total", labels, count)
            own = {"model": name}
            in_flight.add_sample(in_flight.name, own, model.in_flight_count)
            queued.add_sample(queued.name, own, model.queued_count)
            tokens.add_sample(f"{tokens.name}_total", own, model.answer_token_count)
            for migration_type, count in model.migrations.items():
                labels = {**own, "migration_type": migration_type}
                migrations.add_sample(f"{migrations.name}_total", labels, count)
        refused = _metric("requests_refused", "Requests that ended before a model was chosen", "counter")
        for (endpoint, kind), count in reading.refused.items():
            labels = {"endpoint": endpoint, "error_type": kind}
            refused.add_sample(f"{refused.name}_total", labels, count)
        left = _metric("disconnected_clients", "Clients that left before the end of their answer", "gauge")
        left.add_sample(left.name, {}, reading.disconnected_count)
        connected = Metric("dynamo_redis_registry_connected", "1 while Redis answers", "gauge")
        connected.add_sample(connected.name, {}, float(reading.is_connected))
        return [requests, in_flight, queued, tokens, migrations, refused, left, connected]

    def _histograms(self) -> Iterable[Metric]:
        for place, (name, description) in enumerate(_HISTOGRAMS):
            metric = _metric(name, description, "histogram")
            for model, read in self._reading.models.items():
                histogram, labels = read.histograms[place], {"model": model}
                for limit, count in zip((*histogram.limits, None), histogram.counts, strict=True):
                    le = "+Inf" if limit is None else f"{limit:g}"
                    metric.add_sample(f"{metric.name}_bucket", {**labels, "le": le}, count)
                metric.add_sample(f"{metric.name}_sum", labels, histogram.total)
                metric.add_sample(f"{metric.name}_count", labels, histogram.counts[-1])
            yield metric

    def _models(self) -> Iterable[Metric]:
        lengths = _metric("model_context_length", "Most tokens of a prompt and its answer", "gauge")
        sizes = _metric("model_kv_cache_block_size", "Tokens in a block of the KV cache", "gauge")
        limits = _metric("model_migration_limit", "How often an answer may go on at another worker", "gauge")
        counts = _metric("model_instances", "Instances that serve the model", "gauge")
        for model in self._reading.served:
            labels = {"model": model.name}
            lengths.add_sample(lengths.name, labels, model.context_length)
            sizes.add_sample(sizes.name, labels, model.kv_block_size)
            limits.add_sample(limits.name, labels, model.migration_limit)
            counts.add_sample(counts.name, labels, model.instance_count)
        return [lengths, sizes, limits, counts]


def _metric(name: str, description: str, kind: str) -> Metric:
    return Metric(f"dynamo_frontend_{name}", description, kind)
