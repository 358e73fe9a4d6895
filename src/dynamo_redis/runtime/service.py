"""An instance's answers to PING, INFO and STATS, on every plane, in the form of NATS services.

Each process answers at an endpoint of its own (`service_subject`), which is in no record: who can call an
instance can ask it. The form is that of ADR-32 (https://github.com/nats-io/nats-architecture-and-design), so
tools made for NATS services can read it. Beside its fields an endpoint has `in_flight`, and percentiles of
the processing time. All times are in nanoseconds, as there.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from dynamo_redis import __version__
from dynamo_redis.errors import InvalidRequest, PlaneError
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.base import RequestPlaneClient, RequestPlaneServer, Target
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.stats import EndpointStats
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.wire.frame import payload_of

SERVICE_NAME: Final = "dynamo_redis"
SCRAPE_S: Final = 2.0
"""Longest wait for the answers of all instances."""

MAX_DATA_BYTES: Final = 256 << 10
"""The most that an endpoint's stats handler adds to its stats, packed."""

Question = Literal["ping", "info", "stats"]
StatsHandler = Callable[[], Any]
"""Returns what an endpoint adds to its stats, any JSON value."""

_QUESTIONS: Final[tuple[Question, ...]] = ("ping", "info", "stats")
_NS: Final = 1_000_000_000
_NUMBERS: Final = (
    "num_requests",
    "num_errors",
    "in_flight",
    "processing_time",
    "average_processing_time",
    "p50_processing_time",
    "p99_processing_time",
)


def service_subject(instance_id: int) -> str:
    """Return the subject at which an instance answers. No endpoint's name can be the same."""
    return f"{format_instance_id(instance_id)}/-/-/service"


class Service:
    """The answers of one process."""

    def __init__(self, server: RequestPlaneServer, instance_id: int) -> None:
        self._server = server
        self._id = format_instance_id(instance_id)
        self._instance_id = instance_id
        self._endpoints: dict[str, tuple[Instance, StatsHandler | None]] = {}
        self._started = _rfc3339(datetime.now(UTC).timestamp())

    def add(self, instance: Instance, stats_handler: StatsHandler | None) -> None:
        """Tell of an endpoint from now on."""
        self._endpoints[str(instance.name)] = (instance, stats_handler)

    def remove(self, instance: Instance) -> None:
        """Tell no more of an endpoint. Idempotent."""
        self._endpoints.pop(str(instance.name), None)

    async def answer(self, request: Any, _: Context) -> dict[str, Any]:
        """Answer a question: `{"question": "stats"}`, with `"endpoint"` for one endpoint only.

        Raises InvalidRequest.
        """
        question = request.get("question") if isinstance(request, dict) else None
        if question not in _QUESTIONS:
            raise InvalidRequest('ask {"question": "ping"}, "info" or "stats"')
        return self.describe(question, request.get("endpoint"))

    def describe(self, question: Question, endpoint: str | None = None) -> dict[str, Any]:
        """Return the answer to a question."""
        described: dict[str, Any] = {
            "type": f"io.nats.micro.v1.{question}_response",
            "name": SERVICE_NAME,
            "id": self._id,
            "version": __version__,
            "metadata": {"plane": self._server.plane},
        }
        if question == "ping":
            return described
        chosen = [entry for name, entry in self._endpoints.items() if endpoint is None or name == endpoint]
        if question == "info":
            described["description"] = "an instance of dynamo_redis"
            described["endpoints"] = [self._describe_endpoint(instance) for instance, _ in chosen]
        else:
            described["started"] = self._started
            described["endpoints"] = [self._stats_of(instance, handler) for instance, handler in chosen]
        return described

    def _describe_endpoint(self, instance: Instance) -> dict[str, Any]:
        return {
            "name": str(instance.name),
            "subject": instance.name.subject(self._instance_id),
            "queue_group": "",
            "metadata": {},
        }

    def _stats_of(self, instance: Instance, handler: StatsHandler | None) -> dict[str, Any]:
        found = self._describe_endpoint(instance)
        stats = self._server.stats(instance.name.subject(self._instance_id))
        if stats is not None:
            found |= _in_nanoseconds(stats)
        if handler is not None:
            try:
                found["data"] = _checked(handler())
            except Exception as exc:  # noqa: BLE001 - the handler is the user's
                found["data_error"] = f"{type(exc).__name__}: {exc}"
        return found


def _checked(data: Any) -> Any:
    """Return what a stats handler has returned, if each plane can carry it: one handler's data must not cost
    the others' figures. Raises TypeError or ValueError."""
    json.dumps(data)
    size_bytes = len(payload_of({"endpoints": [{"data": data}]}))
    if size_bytes > MAX_DATA_BYTES:
        raise ValueError(f"{size_bytes} bytes are over the limit of {MAX_DATA_BYTES}")
    return data


def _in_nanoseconds(stats: EndpointStats) -> dict[str, Any]:
    return {
        "started": _rfc3339(stats.started_at),
        "num_requests": stats.request_count,
        "num_errors": stats.error_count,
        "last_error": stats.last_error,
        "processing_time": round(stats.processing_s * _NS),
        "average_processing_time": round(stats.average_s * _NS),
        "p50_processing_time": round(stats.p50_s * _NS),
        "p99_processing_time": round(stats.p99_s * _NS),
        "in_flight": stats.in_flight_count,
    }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Answer:
    """An instance's answer to a question, or the error that it ended with."""

    found: dict[str, Any] | PlaneError
    took_s: float
    """The time from the question to this instance's answer, with the connection if there was none."""


async def ask_all(
    client: RequestPlaneClient,
    targets: Iterable[Target],
    question: Question,
    *,
    endpoint: str | None = None,
    timeout_s: float = SCRAPE_S,
) -> dict[int, Answer]:
    """Ask instances at once; return each one's answer by its id."""
    request = {"question": question, "endpoint": endpoint}

    async def ask(target: Target) -> Answer:
        own = Target(target.instance_id, target.address, service_subject(target.instance_id), target.secret)
        began_at = time.monotonic()
        found: dict[str, Any] | PlaneError = InvalidRequest("the instance gave no answer")
        try:
            async with client.open(own, request, Context(deadline=began_at + timeout_s)) as stream:
                async for item in stream:
                    found = read_answer(item)
                    break
        except PlaneError as exc:
            found = exc
        return Answer(found, time.monotonic() - began_at)

    wanted = {target.instance_id: target for target in targets}
    answers = await asyncio.gather(*map(ask, wanted.values()))
    return dict(zip(wanted, answers, strict=True))


def read_answer(item: Any) -> dict[str, Any]:
    """Return an instance's answer, whose endpoints have names and numbers as `Service` gives them. Raises
    InvalidRequest."""
    try:
        json.dumps(item)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequest(f"the instance's answer is no JSON: {exc}") from exc
    endpoints = item.get("endpoints", []) if isinstance(item, dict) else None
    if not isinstance(endpoints, list) or not all(map(_is_endpoint, endpoints)):
        raise InvalidRequest("the instance's answer does not have the form of a NATS service's")
    return dict(item)


def _is_endpoint(described: Any) -> bool:
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        return False
    return all(isinstance(described.get(name, 0), int | float) for name in _NUMBERS)
