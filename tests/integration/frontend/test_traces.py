"""Traces: the spans of a request from its HTTP head to the engine are one tree, over every request plane."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from dynamo_redis.errors import ConnectionLost, HandlerFailed
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime import tracing
from tests.routed_deployment import Deployment, FailingEngine, until, until_served
from tests.routed_deployment import deployment as deployment

WITHIN_S = 60.0
PROMPT = {"model": "demo", "prompt": "A secret prompt.", "max_tokens": 10, "ignore_eos": True}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
WORKER = "dynamo.backend.generate"


class Spans:
    """The spans that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    async def one(self, name: str) -> ReadableSpan:
        """Return the only span of a name, once it has ended."""
        await until(lambda: self.all(name))
        [span] = self.all(name)
        return span

    def __str__(self) -> str:
        return str([span.to_json() for span in self._exporter.get_finished_spans()])


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", tracing.Tracer(provider))
    yield Spans(exporter)
    provider.shutdown()


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    own: int = span.context.span_id
    return own


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize(
    ("plane", "mode", "stream"), [("tcp", "kv", True), ("redis", "round_robin", False), ("http", "kv", True)]
)
async def test_spans_of_a_request_are_one_tree(
    deployment: Deployment, spans: Spans, plane: str, mode: str, stream: bool
) -> None:
    worker = await deployment.worker({"request_plane": plane})
    frontend = await deployment.frontend({"request_plane": plane}, mode=mode)
    await until_served(frontend)
    headers = {"traceparent": TRACEPARENT, "x-request-id": "mine", "authorization": "Bearer secret"}
    answer = await frontend.post("/v1/completions", json={**PROMPT, "stream": stream}, headers=headers)
    assert answer.status_code == 200

    server = await spans.one("text_completion demo")
    prepare, call = await spans.one("prepare"), await spans.one("generate")
    handler, engine = await spans.one(WORKER), await spans.one("engine")
    for span in (server, prepare, call, handler, engine):
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == TRACE
        assert span.status.status_code is StatusCode.UNSET
    assert f"{parent_of(server):016x}" == "00f067aa0ba902b7"
    assert parent_of(prepare) == parent_of(call) == id_of(server)
    assert parent_of(handler) == id_of(call)
    assert parent_of(engine) == id_of(handler)
    assert [server.kind, call.kind, handler.kind] == [SpanKind.SERVER, SpanKind.CLIENT, SpanKind.SERVER]
    if mode == "kv":
        assert parent_of(await spans.one("choose worker")) == id_of(call)

    found = attributes(server)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "demo"
    assert found["gen_ai.usage.output_tokens"] == found["gen_ai.request.max_tokens"] == 10
    assert found["gen_ai.usage.input_tokens"] > 1
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert found["gen_ai.response.time_to_first_chunk"] > 0
    assert (found["http.response.status_code"], found["http.request.method"]) == (200, "POST")
    assert (found["url.path"], found["dynamo.request.id"]) == ("/v1/completions", "mine")
    instance = format_instance_id(worker.instance_id)
    assert attributes(call)["dynamo.instance.id"] == attributes(handler)["dynamo.instance.id"] == instance
    assert attributes(handler)["dynamo.request.id"] == "mine"
    assert [event.name for event in handler.events] == ["first item"]
    assert attributes(engine)["gen_ai.usage.output_tokens"] == 10
    assert "secret" not in str(spans)


async def test_request_without_a_trace_begins_one(deployment: Deployment, spans: Spans) -> None:
    await deployment.worker()
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    for _ in range(2):
        assert (await frontend.post("/v1/completions", json=PROMPT)).status_code == 200
    await until(lambda: len(spans.all(WORKER)) == 2)
    servers = spans.all("text_completion demo")
    assert [parent_of(server) for server in servers] == [None, None]
    traces = {span.context.trace_id for span in servers if span.context}
    assert len(traces) == 2
    assert {span.context.trace_id for span in spans.all(WORKER) if span.context} == traces


async def test_health_checks_have_no_spans(deployment: Deployment, spans: Spans) -> None:
    await deployment.worker()
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    for path in ("/health", "/metrics", "/v1/models"):
        await frontend.get(path)
    assert str(spans) == "[]"


async def test_migration_is_an_event_and_a_second_call(deployment: Deployment, spans: Spans) -> None:
    for _ in range(2):
        await deployment.worker(kind=FailingEngine)
    frontend = await deployment.frontend(mode="round_robin", migration_limit=1)
    await until_served(frontend, instances=2)
    FailingEngine.failure = ConnectionLost("on purpose")
    assert (await frontend.post("/v1/completions", json=PROMPT)).status_code == 200
    server = await spans.one("text_completion demo")
    assert [event.name for event in server.events] == ["migration"]
    assert server.status.status_code is StatusCode.UNSET
    await until(lambda: len(spans.all(WORKER)) == 2)
    lost, whole = spans.all("generate")
    assert parent_of(lost) == parent_of(whole) == id_of(server)
    assert lost.status.status_code is StatusCode.ERROR
    assert attributes(lost)["error.type"] == ConnectionLost.code
    assert whole.status.status_code is StatusCode.UNSET
    assert attributes(lost)["dynamo.instance.id"] != attributes(whole)["dynamo.instance.id"]


async def test_failure_sets_the_status_of_all_parts(deployment: Deployment, spans: Spans) -> None:
    await deployment.worker(kind=FailingEngine)
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    FailingEngine.failure = HandlerFailed("on purpose")
    assert (await frontend.post("/v1/completions", json=PROMPT)).status_code == 502
    for name in ("text_completion demo", "generate", WORKER, "engine"):
        span = await spans.one(name)
        assert span.status.status_code is StatusCode.ERROR, name
        assert "error.type" in attributes(span)


async def test_refusal_of_a_bad_request_is_no_error(deployment: Deployment, spans: Spans) -> None:
    await deployment.worker()
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    assert (await frontend.post("/v1/completions", json={**PROMPT, "temperature": -1})).status_code == 400
    server = await spans.one("text_completion")
    assert server.status.status_code is StatusCode.UNSET
    assert attributes(server)["error.type"] == "validation"
    assert attributes(server)["http.response.status_code"] == 400


async def test_client_that_leaves_cancels_all_spans(deployment: Deployment, spans: Spans) -> None:
    await deployment.worker(speedup_ratio=0.05)
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    body = {**PROMPT, "max_tokens": 2000, "stream": True}
    async with frontend.stream("POST", "/v1/completions", json=body) as answer:
        await anext(answer.aiter_lines())
    for name in ("text_completion demo", "generate", WORKER, "engine"):
        span = await spans.one(name)
        assert span.status.status_code is StatusCode.ERROR, name
        assert attributes(span)["error.type"] == "cancelled", name


async def test_sampling_is_decided_once_for_all_parts(
    deployment: Deployment, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider(shutdown_on_exit=False, sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", tracing.Tracer(provider))
    worker = await deployment.worker()
    frontend = await deployment.frontend(mode="round_robin")
    await until_served(frontend)
    assert (await frontend.post("/v1/completions", json=PROMPT)).status_code == 200
    assert worker.engine.request_count == 1
    assert not exporter.get_finished_spans()


async def test_call_of_a_handler_is_below_its_span(deployment: Deployment, spans: Spans) -> None:
    runtime = await deployment.open_runtime()

    async def decode(request: int) -> AsyncGenerator[int]:
        yield request

    async def prefill(request: int, context: Context) -> AsyncGenerator[int]:
        async for item in await client.generate(request, annotated=False, context=context):
            yield item

    await runtime.endpoint("dynamo.inner.decode").start_serving(decode)
    await runtime.endpoint("dynamo.outer.prefill").start_serving(prefill)
    client = await runtime.endpoint("dynamo.inner.decode").client()
    caller = await runtime.endpoint("dynamo.outer.prefill").client()
    await client.wait_for_instances()
    await caller.wait_for_instances()
    context = Context("mine", traceparent=TRACEPARENT)
    assert [item async for item in await caller.generate(7, annotated=False, context=context)] == [7]
    outer, inner = await spans.one("dynamo.outer.prefill"), await spans.one("dynamo.inner.decode")
    assert parent_of(inner) == id_of(outer)
    assert f"{parent_of(outer):016x}" == "00f067aa0ba902b7"
