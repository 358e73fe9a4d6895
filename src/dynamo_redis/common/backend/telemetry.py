"""Traces of an engine: the names of `dynamo.common.backend.telemetry`.

While no traces are exported, spans are made and do nothing.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, Self

from dynamo_redis.engines.engine_span import current_engine_span
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import tracing


class SpanProxy:
    """A span, or none. As a context manager it ends with the block; an exception makes it an error."""

    def __init__(self, span: tracing.Span | None, *, is_own: bool) -> None:
        self._span = span
        self._is_own = is_own

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute."""
        if self._span is not None:
            self._span.set({key: value})

    def add_event(self, name: str, attrs: dict[str, Any] | None = None) -> None:
        """Note an event at this time."""
        if self._span is not None:
            self._span.add_event(name, attrs)

    def set_status(self, status: Literal["ok", "error"], description: str | None = None) -> None:
        """Set the status. "ok" has no effect: it is the status of a span without an error."""
        if self._span is not None and status == "error":
            self._span.fail("error", description or "")

    def close(self) -> None:
        """End a span that `start_span` made. Idempotent; has no effect on the request's span."""
        span = self._span if self._is_own else None
        if span is not None:
            self._span = None
            span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None and self._span is not None and self._is_own:
            self._span.fail_with(exc)
        self.close()


def current_span(context: Context) -> SpanProxy:
    """Return the span of the request at its engine."""
    return SpanProxy(current_engine_span.get(), is_own=False)


def start_span(context: Context, name: str, **attrs: Any) -> SpanProxy:
    """Begin a span below that of the request. The caller ends it."""
    if tracing.tracer is None:
        return SpanProxy(None, is_own=True)
    span = tracing.tracer.begin(name, "internal", context.traceparent, attrs or None)
    return SpanProxy(span, is_own=True)


def trace_headers(context: Context) -> dict[str, str] | None:
    """Return W3C trace headers for a call to an engine; None without a trace."""
    return context.trace_headers()


def engine_trace_kwargs(
    context: Context, *, kwarg_name: str = "trace_headers", enabled: bool = True
) -> dict[str, dict[str, str]]:
    """Return `{kwarg_name: headers}` for a call to an engine; empty without a trace, or if not `enabled`."""
    headers = context.trace_headers() if enabled else None
    return {} if headers is None else {kwarg_name: headers}
