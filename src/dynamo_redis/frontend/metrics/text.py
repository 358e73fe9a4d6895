"""The metrics of a frontend, with the names of Dynamo's `dynamo_frontend_…`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from dynamo_redis.exposition import Family
from dynamo_redis.frontend.metrics.recording import ErrorType, FrontendMetrics, ModelRecord
from dynamo_redis.histogram import HistogramReading

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
    rejected: Mapping[str, int]
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
            rejected=dict(record.rejected),
            histograms=[histogram.read() for histogram in histograms],
        )


@dataclass(frozen=True, slots=True)
class FrontendReading:
    """The figures of a frontend at one moment."""

    models: Mapping[str, ModelReading]
    served: Sequence[ServedModel]
    refused: Mapping[tuple[str, ErrorType], int]
    disconnected_count: int
    waiting_count: int

    @classmethod
    def of(
        cls, metrics: FrontendMetrics, served: Sequence[ServedModel], *, waiting_count: int = 0
    ) -> FrontendReading:
        """Read the figures of now, when `waiting_count` requests wait for a place. For the event loop's
        thread."""
        return cls(
            models={name: ModelReading.of(record) for name, record in metrics.models.items()},
            served=served,
            refused=dict(metrics.refused),
            disconnected_count=metrics.disconnected_count,
            waiting_count=waiting_count,
        )


def families(reading: FrontendReading) -> list[Family]:
    """Return the metrics of the reading."""
    return [*_requests(reading), *_overload(reading), *_histograms(reading), *_models(reading)]


def _requests(reading: FrontendReading) -> Iterable[Family]:
    requests = _metric("requests_total", "Requests that have ended", "counter")
    in_flight = _metric("inflight_requests", "Requests under way", "gauge")
    queued = _metric("queued_requests", "Requests without an item of their answer yet", "gauge")
    tokens = _metric("output_tokens_total", "Tokens of answers that have ended", "counter")
    migrations = _metric("model_migration_total", "Answers that went on at another worker", "counter")
    for name, model in reading.models.items():
        for (endpoint, request_type, status, kind), count in model.requests.items():
            labels = {
                "model": name, "endpoint": endpoint, "request_type": request_type, "status": status,
                "error_type": kind,
            }  # fmt: skip
            requests.add(count, labels)
        own = {"model": name}
        in_flight.add(model.in_flight_count, own)
        queued.add(model.queued_count, own)
        tokens.add(model.answer_token_count, own)
        for migration_type, count in model.migrations.items():
            labels = {**own, "migration_type": migration_type}
            migrations.add(count, labels)
    refused = _metric("requests_refused_total", "Requests that ended before a model was chosen", "counter")
    for (endpoint, kind), count in reading.refused.items():
        labels = {"endpoint": endpoint, "error_type": kind}
        refused.add(count, labels)
    left = _metric("disconnected_clients", "Clients that left before the end of their answer", "gauge")
    left.add(reading.disconnected_count)
    return [requests, in_flight, queued, tokens, migrations, refused, left]


def _overload(reading: FrontendReading) -> Iterable[Family]:
    rejected = _metric("model_rejection_total", "Requests that were refused because of overload", "counter")
    for name, model in reading.models.items():
        for endpoint, count in model.rejected.items():
            rejected.add(count, {"model": name, "endpoint": endpoint})
    waiting = _metric("admission_queued_requests", "Requests that wait for a place", "gauge")
    waiting.add(reading.waiting_count)
    return [rejected, waiting]


def _histograms(reading: FrontendReading) -> Iterable[Family]:
    for place, (name, description) in enumerate(_HISTOGRAMS):
        metric = _metric(name, description, "histogram")
        for model, read in reading.models.items():
            metric.add_histogram(read.histograms[place], {"model": model})
        yield metric


def _models(reading: FrontendReading) -> Iterable[Family]:
    lengths = _metric("model_context_length", "Most tokens of a prompt and its answer", "gauge")
    sizes = _metric("model_kv_cache_block_size", "Tokens in a block of the KV cache", "gauge")
    limits = _metric("model_migration_limit", "How often an answer may go on at another worker", "gauge")
    counts = _metric("model_instances", "Instances that serve the model", "gauge")
    for model in reading.served:
        labels = {"model": model.name}
        lengths.add(model.context_length, labels)
        sizes.add(model.kv_block_size, labels)
        limits.add(model.migration_limit, labels)
        counts.add(model.instance_count, labels)
    return [lengths, sizes, limits, counts]


def _metric(name: str, description: str, kind: Literal["counter", "gauge", "histogram"]) -> Family:
    return Family(f"dynamo_frontend_{name}", kind, description)
