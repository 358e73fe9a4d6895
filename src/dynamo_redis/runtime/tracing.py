"""Traces: spans of requests, exported by OpenTelemetry. The only importer of its packages.

`tracer` is None unless an exporter is set, so a request without traces costs one comparison. Spans have
explicit parents: a request's `Context.traceparent`, which travels with it over every request plane.

Nothing waits for a collector. Spans that have ended wait for the SDK's thread in a queue of
`OTEL_BSP_MAX_QUEUE_SIZE`, 2,048; spans beyond that are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from dynamo_redis.config import TracingSettings
from dynamo_redis.config.tracing import Exporter
from dynamo_redis.errors import ConfigError, DynamoRedisError
from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context, current_request
from dynamo_redis.rate_limited_log import RateLimitedLog

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

CLOSE_S: Final = 2.0
"""Longest wait at the end for spans that are not exported yet."""

Kind = Literal["server", "client", "internal"]
Value = str | bool | int | float | Sequence[str]

_log = logging.getLogger(__name__)


class Span:
    """A part of a trace, until `end`."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        """The W3C trace context for parts that are caused by this one."""

    def rename(self, name: str) -> None:
        """Give the span another name."""
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Value | None]) -> None:
        """Set attributes; those that are None are left out."""
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def add_event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        """Note an event at this time."""
        self._span.add_event(name, attributes)

    def fail(self, kind: str, description: str = "") -> None:
        """Set the status to an error. `kind` is a word of bounded number, as an error's code."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR, description or kind))

    def fail_with(self, error: BaseException) -> None:
        """Set the status to an error, or to a cancellation."""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.fail("cancelled")
        else:
            kind = error.code if isinstance(error, DynamoRedisError) else type(error).__name__
            self.fail(kind, str(error))

    def end(self) -> None:
        """End the span; it is exported in the background."""
        self._span.end()

    def enter(self) -> None:
        """Make it the present span of this task, for libraries that make spans of their own."""
        from opentelemetry import context, trace

        context.attach(trace.set_span_in_context(self._span))


class Tracer:
    """Begins spans."""

    def __init__(self, provider: trace.TracerProvider, *, is_owned: bool = True) -> None:
        """`is_owned`: `close_tracing` shuts the provider down."""
        from opentelemetry.context import Context as Nothing
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self.is_owned = is_owned
        self._tracer = provider.get_tracer("dynamo_redis")
        self._extract = TraceContextTextMapPropagator().extract
        self._nothing = Nothing()
        self._kinds = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}

    def begin(
        self,
        name: str,
        kind: Kind,
        parent: str | None,
        attributes: Mapping[str, Value] | None = None,
        *,
        at_ns: int | None = None,
    ) -> Span:
        """Begin a span, now or `at_ns` after 1970. Without a `parent`, a W3C trace context, it begins a
        trace."""
        carrier = {} if parent is None else {"traceparent": parent}
        context = self._extract(carrier, self._nothing)
        return Span(self._tracer.start_span(name, context, self._kinds[kind], attributes, start_time=at_ns))


tracer: Tracer | None = None
"""None while no traces are exported."""

_provider: TracerProvider | None = None
"""The provider that this module has given to OpenTelemetry, which takes one in the life of a process."""


# --------------------------------------------------------------------------- handlers


def in_request(handler: Handler, name: str, attributes: Mapping[str, Value]) -> Handler:
    """Return the handler, so that log lines that are written while it runs name its request.

    While traces are exported, each request has a span, too. Spans that are made while it runs, here or at
    other processes, are below that one.
    """

    def call(request: Any, context: Context) -> Any:
        current_request.set(context)  # in the context variables of the request's own task
        if tracer is None:
            return handler(request, context)
        span = tracer.begin(name, "server", context.traceparent, attributes)
        span.set({"dynamo.request.id": context.id()})
        context.traceparent = span.traceparent
        span.enter()
        try:
            result: Any = handler(request, context)
        except BaseException as exc:
            span.fail_with(exc)
            span.end()
            raise
        if hasattr(result, "__anext__"):
            return spanned(result, span, context, ItemCount())
        return _item(result, span)

    return call


class Tally(Protocol):
    """Counts the items of an answer for its span."""

    first: str
    """The name of the event of the first item."""

    def add(self, item: Any) -> None:
        """Count an item. Must not raise."""
        ...

    def attributes(self) -> Mapping[str, Value | None]:
        """Return the attributes of the span at its end."""
        ...


class ItemCount:
    """A tally of any items."""

    first = "first item"

    def __init__(self) -> None:
        self._count = 0

    def add(self, item: Any) -> None:
        """See `Tally.add`."""
        self._count += 1

    def attributes(self) -> Mapping[str, Value | None]:
        """See `Tally.attributes`."""
        return {"dynamo.response.items": self._count}


async def spanned(
    items: AsyncIterator[Any], span: Span, context: Context, tally: Tally
) -> AsyncGenerator[Any]:
    """Yield the items of an answer; end its span with it, as failed if it fails or is cancelled."""
    has_begun = False
    try:
        async for item in items:
            if not has_begun:
                has_begun = True
                span.add_event(tally.first)
            tally.add(item)
            yield item
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
            span.set(tally.attributes())
            span.end()


async def _item(answer: Awaitable[Any], span: Span) -> Any:
    try:
        return await answer
    except BaseException as exc:
        span.fail_with(exc)
        raise
    finally:
        span.end()


# --------------------------------------------------------------------------- lifetime


def configure_tracing(
    service_name: str = "dynamo", instance_id: str | None = None, *, settings: TracingSettings | None = None
) -> None:
    """Export the traces of this process, if an exporter or endpoint is set. Call it once, at start.

    `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` replace these names. A program that has set
    OpenTelemetry's tracer provider before keeps it, and requests are traced there. Raises ConfigError if the
    packages are missing.
    """
    settings = settings or TracingSettings.load()
    if not settings.exporters:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        known = trace.get_tracer_provider()
        if isinstance(known, TracerProvider) and known is not _provider:
            _use(Tracer(known, is_owned=False))
            return
        exporters = [_watched(_make_exporter(name, settings)) for name in settings.exporters]
    except ImportError as exc:
        raise ConfigError(
            f"traces are on, but {exc.name} is not installed: pip install 'dynamo-redis[otel]', or unset "
            "OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER and OTEL_EXPORT_ENABLED"
        ) from exc
    names: dict[str, Any] = {"service.name": service_name}
    if instance_id is not None:
        names["service.instance.id"] = instance_id
    names |= OTELResourceDetector().detect().attributes  # those of the environment
    if settings.otel_service_name:
        names["service.name"] = settings.otel_service_name
    provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    _publish(provider)
    # `_watched` tells of failures once in a while; the packages themselves tell of each attempt.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    _use(Tracer(provider))
    _log.info("traces are exported: %s", ", ".join(settings.exporters))


def _use(new: Tracer | None) -> None:
    global tracer
    tracer = new


def _publish(provider: TracerProvider) -> None:
    """Let other libraries of the process make spans with this provider."""
    global _provider
    if _provider is None:
        from opentelemetry import trace

        trace.set_tracer_provider(provider)
        _provider = provider


def _make_exporter(name: Exporter, settings: TracingSettings) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)  # stdout has the line that says that the process is ready
    if settings.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

        exporter: SpanExporter = grpc.OTLPSpanExporter(endpoint=settings.traces_url)
        return exporter
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

    return http.OTLPSpanExporter(endpoint=settings.traces_url)


def _watched(exporter: SpanExporter) -> SpanExporter:
    """Return an exporter that logs its failures, at a limited rate."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    complaints = RateLimitedLog(_log, pause_s=60.0)

    class Watched(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                result = exporter.export(spans)
            except Exception as exc:  # noqa: BLE001 - an exporter's own; the thread that calls it must go on
                complaints.log("spans are lost, since the exporter failed: %r", exc)
                return SpanExportResult.FAILURE
            if result is not SpanExportResult.SUCCESS:
                complaints.log("spans are lost, since the collector does not take them")
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Watched()


async def close_tracing() -> None:
    """Export the spans that wait, for at most `CLOSE_S`, and make no more. Idempotent."""
    closing = tracer
    _use(None)
    if closing is None or not closing.is_owned:
        return
    provider: Any = closing.provider
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def shut_down() -> None:
        provider.shutdown()
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(ended.set)

    # A thread that may be left behind: the exporter's own time-outs are longer.
    threading.Thread(target=shut_down, name="end of tracing", daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await ended.wait()
