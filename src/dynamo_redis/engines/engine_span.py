"""The span of an engine's work on a request, while traces are exported."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from typing import Any

from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import tracing

current_engine_span: ContextVar[tracing.Span | None] = ContextVar("current_engine_span", default=None)
"""The span of the request that this code of an engine works for."""


def with_engine_span(generate: Callable[[Any, Context], AsyncIterator[Any]]) -> Handler:
    """Return an engine's `generate`, with a span for each request while traces are exported."""

    def call(request: Any, context: Context) -> Any:
        if tracing.tracer is None:
            return generate(request, context)
        span = tracing.tracer.begin("engine", "internal", context.traceparent)
        context.traceparent = span.traceparent
        current_engine_span.set(span)  # in the context variables of the request's own task
        return tracing.spanned(generate(request, context), span, context, _TokenCount())

    return call


class _TokenCount:
    """A tally of tokens. An item that is none, which the receiver refuses, has no tokens."""

    first = "first token"

    def __init__(self) -> None:
        self._count = 0
        self._reason: str | None = None

    def add(self, item: Any) -> None:
        """See `tracing.Tally.add`."""
        if isinstance(item, dict):
            token_ids, reason = item.get("token_ids"), item.get("finish_reason")
            self._count += len(token_ids) if isinstance(token_ids, list) else 0
            self._reason = reason if isinstance(reason, str) else None

    def attributes(self) -> Mapping[str, tracing.Value | None]:
        """See `tracing.Tally.attributes`."""
        return {
            "gen_ai.usage.output_tokens": self._count,
            "gen_ai.response.finish_reasons": [self._reason] if self._reason else None,
        }
