"""The span of an engine's work on a request, while traces are exported."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import tracing

current_engine_span: ContextVar[tracing.Span | None] = ContextVar("current_engine_span", default=None)
"""The span of the request that this code of an engine works for."""


def with_engine_span(generate: Handler) -> Handler:
    """Return an engine's `generate`, with a span for each request while traces are exported."""

    def call(request: Any, context: Context) -> Any:
        if tracing.tracer is None:
            return generate(request, context)
        span = tracing.tracer.begin("engine", "internal", context.traceparent)
        context.traceparent = span.traceparent
        return _watch(generate(request, context), span, context)

    return call


async def _watch(items: Any, span: tracing.Span, context: Context) -> AsyncGenerator[Any]:
    token_count, last = 0, None
    current_engine_span.set(span)
    try:
        async for last in items:
            if not token_count:
                span.add_event("first token")
            token_count += _token_count(last)
            yield last
        if context.is_stopped():
            span.fail("cancelled")
    except BaseException as exc:
        span.fail_with(exc)
        raise
    finally:
        try:
            if isinstance(items, AsyncGenerator):
                await items.aclose()
        finally:
            reason = last.get("finish_reason") if isinstance(last, dict) else None
            if isinstance(reason, str):
                span.set({"gen_ai.response.finish_reasons": [reason]})
            span.set({"gen_ai.usage.output_tokens": token_count})
            span.end()
            current_engine_span.set(None)


def _token_count(item: Any) -> int:
    """Return the number of tokens of an item; 0 for what is no item, which the receiver refuses."""
    token_ids = item.get("token_ids") if isinstance(item, dict) else None
    return len(token_ids) if isinstance(token_ids, list) else 0
