"""Admission control of a server: the requests that run, those that wait, and those that are refused.

- At most `DYN_TCP_MAX_IN_FLIGHT` handlers run. Beside these, an endpoint with fewer than `RESERVED_COUNT`
  requests may always start one: a worker that is full of one endpoint's requests still reports its load, its
  health and its cache.
- Up to `DYN_TCP_MAX_QUEUED` requests wait. The connections take turns, so a connection that sends thousands
  delays another one's next request by one handler start.
- When the queue is full, a request replaces the newest one of the connection with most waiting requests, if
  its own connection has fewer; else it is refused. The request that loses its place gets Overloaded, with a
  hint: the time that the waiting requests will take at the rate at which requests have finished.
- A request that came as a raw payload is counted in the plane's budget of bytes, in the share of its
  connection, until it has ended; the decoder refuses payloads that do not fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from typing import Final

from dynamo_redis.errors import Overloaded, PlaneError
from dynamo_redis.planes.frames.connection import Connection
from dynamo_redis.planes.frames.fair_queue import FairQueue
from dynamo_redis.planes.frames.server_request import RegisteredEndpoint, Request
from dynamo_redis.rate_limited_log import RateLimitedLog

RESERVED_COUNT: Final = 16
"""Requests that an endpoint may run in any case; half of `DYN_TCP_MAX_IN_FLIGHT` if that is less."""

_RETRY_AFTER_S: Final = (0.05, 10.0)
_UNKNOWN_RETRY_AFTER_S: Final = 1.0
_WINDOW_S: Final = 1.0
_ENOUGH_COUNT: Final = 20

_FULL: Final = (
    "requests are refused: DYN_TCP_MAX_IN_FLIGHT=%d are being handled and DYN_TCP_MAX_QUEUED=%d wait; "
    "start more workers, or raise these limits if this one has room"
)


class FinishRate:
    """The rate at which requests finish while the server is full.

    It is measured between two readings of a counter, so a request costs only its count. The readings are at
    most two windows apart if the rate is asked for often enough. Time in which the server had room does not
    count: it would make a worker with little work look slow.
    """

    __slots__ = ("_known_per_s", "_newer", "_older")

    def __init__(self) -> None:
        self._older = self._newer = (float("-inf"), 0)
        self._known_per_s: float | None = None

    def resume(self, now_s: float, finished_count: int) -> None:
        """Begin to measure: the server has become full. A reading of a moment ago still counts."""
        if now_s - self._newer[0] > 2 * _WINDOW_S:
            self._older = self._newer = (now_s, finished_count)

    def per_s(self, now_s: float, finished_count: int) -> float | None:
        """Return the requests that finish in a second; None until enough have. Call it after `resume`."""
        since_s, since_count = self._older
        elapsed_s, finished = now_s - since_s, finished_count - since_count
        if elapsed_s >= _WINDOW_S or (finished >= _ENOUGH_COUNT and elapsed_s > 0):
            self._known_per_s = finished / elapsed_s
        if now_s - self._newer[0] >= _WINDOW_S:
            self._older, self._newer = self._newer, (now_s, finished_count)
        return self._known_per_s


class AdmissionControl:
    """Implements `server_request.Admission`. `loop` is the event loop that the handlers run on."""

    __slots__ = (
        "_complaints",
        "_finish_rate",
        "_finished_count",
        "_large",
        "_max_in_flight_count",
        "_max_queued_count",
        "_reserved_count",
        "_running",
        "_starting",
        "_unbegun",
        "_waiting",
        "loop",
    )

    loop: asyncio.AbstractEventLoop

    def __init__(
        self, *, max_in_flight_count: int, max_queued_count: int, complaints: RateLimitedLog
    ) -> None:
        self._complaints = complaints
        self._max_in_flight_count = max_in_flight_count
        self._max_queued_count = max_queued_count
        # At most half of the limit, so an endpoint that fills the limit alone is over its reserve.
        self._reserved_count = min(RESERVED_COUNT, (max_in_flight_count + 1) // 2)
        self._running: set[Request] = set()
        self._large: dict[Request, int] = {}  # their sizes in bytes
        self._waiting: FairQueue[Connection, Request] = FairQueue()
        self._starting = False
        self._unbegun: list[Request] = []  # started in this turn of the event loop
        self._finished_count = 0
        self._finish_rate = FinishRate()

    def __iter__(self) -> Iterator[Request]:
        """Yield the waiting requests, then those whose handlers run."""
        yield from self._waiting
        yield from self._running

    @property
    def running_count(self) -> int:
        """Count of requests whose handlers run."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Count of requests that wait for a handler."""
        return self._waiting.size

    def admit(self, request: Request) -> None:
        """Start the request, or let it wait. Raises Overloaded."""
        running = self._running
        if len(running) < self._max_in_flight_count or request.endpoint.active_count < self._reserved_count:
            request.endpoint.active_count += 1
            self._start(request)
            return
        waiting = self._waiting
        if not waiting.size:
            self._finish_rate.resume(self.loop.time(), self._finished_count)
        if waiting.size >= self._max_queued_count:
            newest = waiting.eviction_candidate(request.connection)
            self._complaints.log(_FULL, self._max_in_flight_count, self._max_queued_count)
            error = Overloaded(
                f"the worker is at its limit (DYN_TCP_MAX_IN_FLIGHT={self._max_in_flight_count}, "
                f"DYN_TCP_MAX_QUEUED={self._max_queued_count})",
                self.retry_after_s(),
            )
            if newest is None:
                raise error
            newest.abort(error)  # it leaves by `dequeue`
        request.endpoint.active_count += 1
        waiting.push(request.connection, request)

    def _start(self, request: Request) -> None:
        """Start the request's handler."""
        self._running.add(request)
        request.launch(self.loop)
        if not request.has_begun:
            self._look_after(request)

    def _look_after(self, request: Request) -> None:
        """Look in the next turn of the event loop whether the handler has begun. One look at all that were
        started in a turn costs less than a callback of each task."""
        if not self._unbegun:
            self.loop.call_soon(self._end_unbegun)
        self._unbegun.append(request)

    def _end_unbegun(self) -> None:
        """End the requests whose handlers were cancelled before they began."""
        started, self._unbegun = self._unbegun, []
        for request in [request for request in started if not request.has_begun]:
            if not request.end_if_cancelled():
                self._look_after(request)

    def admit_large(self, request: Request, size_bytes: int) -> None:
        """See `server_request.Admission.admit_large`. Raises Overloaded."""
        self._large[request] = size_bytes
        request.connection.payload_share.reserve(size_bytes)
        try:
            self.admit(request)
        except Overloaded:
            self._release_payload(request)
            raise

    def dequeue(self, request: Request) -> None:
        """See `server_request.Admission.dequeue`."""
        if self._waiting.remove(request.connection, request):
            self._release_payload(request)
            request.endpoint.counts.unstarted_count += 1
            request.endpoint.release()

    def refuse_waiting(self, endpoints: Collection[RegisteredEndpoint], error: PlaneError) -> None:
        """Refuse the waiting requests of these endpoints."""
        for request in tuple(self._waiting):
            if request.endpoint in endpoints:
                request.abort(error)  # it leaves by `dequeue`

    def finished(self, request: Request) -> None:
        """See `server_request.Admission.finished`. Starts the next waiting request."""
        self._running.discard(request)
        self._finished_count += 1
        if self._large:
            self._release_payload(request)
        endpoint = request.endpoint
        if endpoint.idle is None:  # no drain waits for its last request: the usual case
            endpoint.active_count -= 1
        else:
            endpoint.release()
        if not self._waiting.size or self._starting:
            return
        self._starting = True  # a handler that ends while it starts must not start the next one, too
        try:
            while self._waiting.size and len(self._running) < self._max_in_flight_count:
                following = self._waiting.pop()
                self._start(following)
        finally:
            self._starting = False

    def retry_after_s(self) -> float:
        """Return the seconds that the waiting requests will take, within `_RETRY_AFTER_S`."""
        now_s = self.loop.time()
        if not self._waiting.size:
            self._finish_rate.resume(now_s, self._finished_count)
        per_s = self._finish_rate.per_s(now_s, self._finished_count)
        if per_s is None:
            return _UNKNOWN_RETRY_AFTER_S
        least_s, most_s = _RETRY_AFTER_S
        return min(max((self._waiting.size + 1) / per_s, least_s), most_s) if per_s else most_s

    def _release_payload(self, request: Request) -> None:
        """Release the request's share of the budget, if it came as a raw payload."""
        request.connection.payload_share.release(self._large.pop(request, 0))
