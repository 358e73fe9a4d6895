"""Counts of an endpoint's requests, at its server."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Final

RECENT_COUNT: Final = 1000
"""The latest requests, of which the percentiles are computed."""

_LAST_ERROR_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class EndpointStats:
    """The counts of one endpoint. Times are in seconds; `started_at` is in seconds since 1970.

    The processing time of a request runs from the start of its handler to the end of its answer.
    """

    started_at: float
    request_count: int
    error_count: int
    in_flight_count: int
    processing_s: float
    p50_s: float
    p99_s: float
    last_error: str

    @property
    def average_s(self) -> float:
        """The mean processing time."""
        return self.processing_s / self.request_count if self.request_count else 0.0


class RequestCounts:
    """Counts requests as they finish: a few tenths of a microsecond each."""

    __slots__ = ("_recent_s", "error_count", "last_error", "processing_s", "request_count", "started_at")

    def __init__(self) -> None:
        self.started_at = time.time()
        self.request_count = 0
        self.error_count = 0
        self.processing_s = 0.0
        self.last_error = ""
        self._recent_s: deque[float] = deque(maxlen=RECENT_COUNT)

    def add(self, seconds: float) -> None:
        """Count a request whose handler has ended."""
        self.request_count += 1
        self.processing_s += seconds
        self._recent_s.append(seconds)

    def add_error(self, text: str) -> None:
        """Count a request that ends with an error."""
        self.error_count += 1
        self.last_error = text[:_LAST_ERROR_CHARS]

    def snapshot(self, in_flight_count: int) -> EndpointStats:
        """Return the counts of now."""
        recent_s = sorted(self._recent_s)
        return EndpointStats(
            started_at=self.started_at,
            request_count=self.request_count,
            error_count=self.error_count,
            in_flight_count=in_flight_count,
            processing_s=self.processing_s,
            p50_s=_percentile(recent_s, 0.5),
            p99_s=_percentile(recent_s, 0.99),
            last_error=self.last_error,
        )


def _percentile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0
