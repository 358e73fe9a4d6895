"""The counts of a frontend's requests, by model. Names of outcomes are those of Dynamo.

A streamed item costs a reading of the clock and an append.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Final, Literal

from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.observation import Kind, Observation
from dynamo_redis.histogram import Histogram

DURATION_LIMITS_S: Final = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
FIRST_TOKEN_LIMITS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0
)  # fmt: skip
TOKEN_GAP_LIMITS_S: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
)
_TOKENS: Final = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)

ErrorType = Literal[
    "", "validation", "not_found", "overload", "unavailable", "cancelled", "response_timeout", "internal",
    "not_implemented",
]  # fmt: skip

_BY_STATUS: Final[dict[int, ErrorType]] = {
    404: "not_found",
    408: "response_timeout",
    429: "overload",
    499: "cancelled",
    501: "not_implemented",
    502: "unavailable",
    503: "unavailable",
    504: "response_timeout",
    529: "overload",
}

ENDPOINTS: Final[dict[Kind, str]] = {
    "chat": "chat_completions",
    "text": "completions",
    "messages": "anthropic_messages",
    "responses": "responses",
    "embeddings": "embeddings",
}


def error_type(error: ApiError) -> ErrorType:
    """Return the word for an error's sort."""
    if error.code == "overloaded":
        return "overload"
    if error.code == "handler_failed":
        return "internal"
    found = _BY_STATUS.get(error.status)
    if found is not None:
        return found
    return "validation" if error.status < 500 else "internal"


class ModelRecord:
    """The counts of one model."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str, ErrorType]] = Counter()
        """By endpoint, request type, status and error type."""
        self.in_flight_count = 0
        self.queued_count = 0
        self.durations_s = Histogram(DURATION_LIMITS_S)
        self.first_token_s = Histogram(FIRST_TOKEN_LIMITS_S)
        self.token_gaps_s = Histogram(TOKEN_GAP_LIMITS_S)
        self.prompt_tokens = Histogram(_TOKENS)
        self.answer_tokens = Histogram(_TOKENS)
        self.cached_tokens = Histogram(_TOKENS)
        self.answer_token_count = 0
        self.migrations: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        """Requests that were refused because of overload, by endpoint."""


class FrontendMetrics:
    """The counts of a frontend. Models are those that it has served: their number is bounded by the registry,
    not by what clients ask for."""

    def __init__(self) -> None:
        self.models: dict[str, ModelRecord] = {}
        self.disconnected_count = 0
        self.refused: Counter[tuple[str, ErrorType]] = Counter()
        """Requests that ended before their model was known, by endpoint and error type."""

    def begin(self, model: str, kind: Kind, *, is_stream: bool, started_at: float) -> RequestRecord:
        """Count a request that goes to a worker. `started_at` is on `time.perf_counter`."""
        record = self.models.get(model)
        if record is None:
            record = self.models[model] = ModelRecord()
        return RequestRecord(self, record, kind, "stream" if is_stream else "unary", started_at)

    def refuse(self, kind: Kind, error: ApiError) -> None:
        """Count a request that does not reach a worker."""
        self.refused[ENDPOINTS[kind], error_type(error)] += 1

    def note_gone(self, kind: Kind) -> None:
        """Count a request whose client left before it reached a worker."""
        self.refused[ENDPOINTS[kind], "cancelled"] += 1
        self.disconnected_count += 1


class RequestRecord:
    """One request under way."""

    __slots__ = (
        "_all",
        "_endpoint",
        "_has_tokens",
        "_is_queued",
        "_request_type",
        "_started_at",
        "gaps_s",
        "model",
        "observation",
    )

    def __init__(
        self, metrics: FrontendMetrics, model: ModelRecord, kind: Kind, request_type: str, started_at: float
    ) -> None:
        self._all = metrics
        self._endpoint = ENDPOINTS[kind]
        self._request_type = request_type
        self._started_at = started_at
        self._is_queued = True
        self.model = model
        # An item of embeddings is no token: it would count as one in what the dashboard shows of all models.
        self._has_tokens = kind != "embeddings"
        self.gaps_s = model.token_gaps_s if self._has_tokens else Histogram(TOKEN_GAP_LIMITS_S)
        self.observation: Observation | None = None
        """Also gets what is noted here, for the access line and the trace."""
        model.in_flight_count += 1
        model.queued_count += 1

    def note_first_item(self, now: float) -> None:
        """Note the first item of a choice's answer."""
        if self._is_queued:
            self._is_queued = False
            self.model.queued_count -= 1
            if self._has_tokens:
                self.model.first_token_s.add(now - self._started_at)
            if self.observation is not None:
                self.observation.note_first_item(now)

    def note_resent(self, count: int) -> None:
        """Note how often the request of a choice was sent to another instance before its first item."""
        if count:
            self.model.migrations["new_request"] += count

    def note_migration(self) -> None:
        """Note that an answer goes on at another worker."""
        self.model.migrations["ongoing_request"] += 1
        if self.observation is not None:
            self.observation.note_migration()

    def end(
        self,
        error: ApiError | None,
        *,
        has_hung_up: bool,
        prompt_token_count: int,
        answer_token_count: int,
        cached_token_count: int | None,
    ) -> None:
        """Count the end. Called once."""
        model = self.model
        model.in_flight_count -= 1
        if self._is_queued:
            self._is_queued = False
            model.queued_count -= 1
        kind: ErrorType = ""
        if has_hung_up:
            kind = "cancelled"
            self._all.disconnected_count += 1
        elif error is not None:
            kind = error_type(error)
            if error.code == "overloaded":
                model.rejected[self._endpoint] += 1
        status = "error" if kind else "success"
        model.requests[self._endpoint, self._request_type, status, kind] += 1
        model.durations_s.add(time.perf_counter() - self._started_at)
        model.prompt_tokens.add(prompt_token_count)
        if self._has_tokens:
            model.answer_tokens.add(answer_token_count)
        model.answer_token_count += answer_token_count
        if cached_token_count is not None:
            model.cached_tokens.add(cached_token_count)
        if self.observation is not None:
            self.observation.error_type = kind
            self.observation.prompt_token_count = prompt_token_count
            self.observation.answer_token_count = answer_token_count
            self.observation.cached_token_count = cached_token_count
