"""Counts of an endpoint's requests, at its server."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dynamo_redis.histogram import Histogram

RECENT_COUNT: Final = 1000
"""The latest requests, of which the percentiles are computed."""

DURATION_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper limits of the processing times that are counted together."""

_LAST_ERROR_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class EndpointStats:
    """The counts of one endpoint. Times are in seconds; `started_at` is in seconds since 1970.

    The processing time of a request runs from the start of its handler to the end of its answer.
    `duration_counts` are the requests that took at most each of `DURATION_BUCKETS_S`, then all whose handler
    began. A request may end before that, as at its deadline in the queue. `error_counts` are by the errors'
    codes. `cancelled_count` is of requests whose caller did not want the rest of the answer.
    """

    started_at: float
    request_count: int
    error_count: int
    in_flight_count: int
    processing_s: float
    p50_s: float
    p99_s: float
    last_error: str
    error_counts: Mapping[str, int]
    cancelled_count: int
    duration_counts: Sequence[int]

    @property
    def average_s(self) -> float:
        """The mean processing time of the requests whose handler began."""
        return self.processing_s / self.duration_counts[-1] if self.duration_counts[-1] else 0.0


class RequestCounts:
    """Counts requests as they finish.

    A request costs two readings of the clock and one append, some 0.4 µs in all: the sums are made for
    `FOLD_COUNT` requests at once.
    """

    __slots__ = (
        "_durations_s",
        "_error_counts",
        "_recent_s",
        "cancelled_count",
        "durations_s",
        "last_error",
        "started_at",
        "unstarted_count",
    )

    def __init__(self) -> None:
        self.started_at = time.time()
        self._durations_s = Histogram(DURATION_BUCKETS_S)
        self.durations_s = self._durations_s.pending
        """The processing times of the latest requests, which are in no sum yet."""
        self._error_counts: Counter[str] = Counter()
        self.cancelled_count = 0
        self.unstarted_count = 0
        """Requests that ended before their handler began."""
        self.last_error = ""
        self._recent_s: deque[float] = deque(maxlen=RECENT_COUNT)

    def fold(self) -> None:
        """Add the latest processing times to the sums."""
        self._recent_s.extend(self.durations_s)
        self._durations_s.fold()

    def add_error(self, code: str, text: str) -> None:
        """Count a request that ends with an error."""
        self._error_counts[code] += 1
        self.last_error = text[:_LAST_ERROR_CHARS]

    def add_refused(self, code: str, text: str) -> None:
        """Count a request that is answered with an error before it waits for a handler."""
        self.unstarted_count += 1
        self.add_error(code, text)

    def snapshot(self, in_flight_count: int) -> EndpointStats:
        """Return the counts of now."""
        self.fold()
        durations_s, recent_s = self._durations_s.read(), sorted(self._recent_s)
        return EndpointStats(
            started_at=self.started_at,
            request_count=durations_s.counts[-1] + self.unstarted_count,
            error_count=self._error_counts.total(),
            in_flight_count=in_flight_count,
            processing_s=durations_s.total,
            p50_s=_percentile(recent_s, 0.5),
            p99_s=_percentile(recent_s, 0.99),
            last_error=self.last_error,
            error_counts=dict(self._error_counts),
            cancelled_count=self.cancelled_count,
            duration_counts=durations_s.counts,
        )


def _percentile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0
