"""Engines of the unified backend on a real Redis: what they get, what callers get, and bad engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dynamo_redis.common.backend import (
    DiffusionEngine,
    EngineConfig,
    LLMEngine,
    LlmRegistration,
    Worker,
    WorkerConfig,
    telemetry,
)
from dynamo_redis.common.backend.health_check import build_health_check_payload, is_probe
from dynamo_redis.common.backend.metrics import EngineMetrics
from dynamo_redis.common.backend.publisher import ComponentSnapshot, KvEventSource, PushSource, ZmqSource
from dynamo_redis.common.constants import DisaggregationMode
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.errors import ConfigError, EngineFailed, HandlerFailed, InvalidRequest, ModelError
from dynamo_redis.events.block_hashes import chain, local_hashes
from dynamo_redis.llm import KvEventPublisher, ModelInput
from dynamo_redis.llm.exceptions import Disconnected, InvalidArgument
from dynamo_redis.models.card import ModelCard
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime import Context, DistributedRuntime, Settings, tracing
from dynamo_redis.wire.event import EventBatch
from dynamo_redis.wire.kv_event import read_kv_events
from tests.integration.engines.kv_event_server import KvEventServer, block_stored

ENDPOINT = "dynamo.backend.generate"
WITHIN_S = 20.0
LAST = {"token_ids": [], "index": 0, "finish_reason": "stop"}

Answer = Callable[[Any, Context], Any]


class TestedEngine(LLMEngine):
    """An engine whose `generate` is `answer`. It notes the calls of its other methods in `calls`."""

    __test__ = False

    def __init__(self, answer: Answer | None = None, **registration: Any) -> None:
        self.answer = answer or echo
        self.registration = LlmRegistration(**registration)
        self.calls: list[str] = []
        self.aborted = asyncio.Event()
        self.contexts: list[Context] = []

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[TestedEngine, WorkerConfig]:
        return cls(), WorkerConfig("dynamo")

    async def start(self, worker_id: int) -> EngineConfig:
        self.calls.append("start")
        return EngineConfig(str(DEMO_MODEL_PATH), "own", llm=self.registration)

    def generate(self, request: Any, context: Context) -> AsyncGenerator[Any, None]:
        self.contexts.append(context)
        answered: AsyncGenerator[Any, None] = self.answer(request, context)
        return answered

    async def abort(self, context: Context) -> None:
        self.calls.append("abort")
        self.aborted.set()

    async def drain(self) -> None:
        self.calls.append("drain")

    async def cleanup(self) -> None:
        self.calls.append("cleanup")


async def echo(request: Any, context: Context) -> AsyncGenerator[Any, None]:
    for token in request["token_ids"]:
        yield {"token_ids": [token], "index": 0}
    yield LAST


@dataclass
class Serving:
    """A worker as its process runs it, and a caller in another runtime."""

    runtime: DistributedRuntime
    caller: DistributedRuntime
    task: asyncio.Task[None]

    async def ask(self, endpoint: str = "generate", request: Any = None, **request_keys: Any) -> list[Any]:
        async with await self.caller.endpoint(f"dynamo.backend.{endpoint}").client() as client:
            await client.wait_for_instances(WITHIN_S)
            asked = {"token_ids": [1, 2, 3], **request_keys} if endpoint == "generate" else request
            return [item async for item in await client.generate(asked, annotated=False)]

    async def stop(self) -> None:
        """Shut the worker down, as SIGTERM does."""
        self.runtime.shutdown()
        await self.task


Serve = Callable[..., AbstractAsyncContextManager[Serving]]


@pytest.fixture
def settings(dynamo_redis_url: str, dynamo_redis_prefix: str) -> dict[str, Any]:
    return {"redis_url": dynamo_redis_url, "prefix": dynamo_redis_prefix, "drain_s": 4, "cancel_grace_s": 0.1}


@pytest.fixture
def serve(settings: dict[str, Any]) -> Serve:
    @asynccontextmanager
    async def served(engine: TestedEngine, **config: Any) -> AsyncIterator[Serving]:
        async with (
            DistributedRuntime(settings=Settings.load(**settings)) as caller,
            DistributedRuntime(settings=Settings.load(**settings)) as runtime,
        ):
            worker = Worker(engine, WorkerConfig(**{"namespace": "dynamo", **config}))
            task = asyncio.create_task(worker.serve(runtime))
            try:
                yield Serving(runtime, caller, task)
            finally:
                runtime.shutdown()
                with suppress(EngineFailed, ConfigError, ModelError):
                    await task

    return served


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.01)


async def card_of(serving: Serving) -> ModelCard:
    key = EndpointName.parse(ENDPOINT).model_card_key(serving.runtime.instance_id)
    async with asyncio.timeout(WITHIN_S):
        while (record := await serving.caller.registry.get(key)) is None:
            await asyncio.sleep(0.01)
    return ModelCard.from_bytes(record.value)


# --------------------------------------------------------------------------- sound engines


async def test_engine_is_served_and_cleaned_up_once(serve: Serve) -> None:
    engine = TestedEngine(context_length=77, total_kv_blocks=5)
    async with serve(engine, endpoint_types="completions") as serving:
        *tokens, last = await serving.ask()
        assert tokens == [{"token_ids": [1]}, {"token_ids": [2]}, {"token_ids": [3]}]
        assert last == {"token_ids": [], "finish_reason": "stop"}
        card = await card_of(serving)
        assert (card.display_name, card.model_type, card.context_length) == ("own", "completions", 77)
        assert card.runtime_config.model_dump(exclude_none=True) == {
            "data_parallel_size": 1,
            "total_kv_blocks": 5,
            "event_plane": "stream",
        }
        await serving.stop()
    assert engine.calls == ["start", "drain", "cleanup"]


async def test_config_names_come_before_the_engines(serve: Serve) -> None:
    config = {"served_model_name": "configured", "model_name": str(DEMO_MODEL_PATH)}
    async with serve(TestedEngine(), **config, tool_call_parser="hermes") as serving:
        card = await card_of(serving)
        assert (card.display_name, card.runtime_config.tool_call_parser) == ("configured", "hermes")


async def test_engine_gets_the_rank_of_the_router(serve: Serve) -> None:
    async def ranks(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        yield {**LAST, "engine_data": {"routing": request.get("routing")}}

    async with serve(TestedEngine(ranks, data_parallel_size=2)) as serving:
        (item,) = await serving.ask(dp_rank=1)
        assert item["engine_data"] == {"routing": {"dp_rank": 1}}
        (item,) = await serving.ask()
        assert item["engine_data"] == {"routing": None}


async def test_usage_tells_frontends_of_cached_tokens(serve: Serve) -> None:
    async def cached(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        usage = {"prompt_tokens": 3, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 2}}
        yield {**LAST, "finish_reason": "abort", "completion_usage": usage}

    async with serve(TestedEngine(cached)) as serving:
        (item,) = await serving.ask()
        assert (item["cached_tokens"], item["finish_reason"]) == (2, "cancelled")


class RoutedEngine(TestedEngine):
    """Publishes a prompt's first block, and the load of two ranks."""

    publisher: KvEventPublisher
    snapshots: Any

    async def kv_event_sources(self) -> list[KvEventSource]:
        def keep(publisher: KvEventPublisher) -> None:
            self.publisher = publisher

        return [PushSource(keep)]

    def component_metrics_dp_ranks(self) -> list[int]:
        return [0, 1]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        self.snapshots = publisher

    async def register_prometheus(self, metrics: EngineMetrics) -> None:
        metrics.register_prometheus_expfmt_callback(
            lambda: '# TYPE own_steps counter\nown_steps_total{kind="prefill"} 7\n'
        )
        metrics.register_prometheus_expfmt_callback(lambda: 1 // 0 * "")


async def test_routers_learn_blocks_and_load(serve: Serve) -> None:
    engine = RoutedEngine(kv_cache_block_size=4, data_parallel_size=2, max_num_seqs=9)
    async with serve(engine) as serving:
        await serving.ask()
        prompt = [5, 6, 7, 8]
        await asyncio.to_thread(engine.publisher.publish_stored, prompt, [4], [99])
        engine.snapshots.publish(1, ComponentSnapshot(3, 10, 0.3, dp_rank=1, kv_cache_hit_rate=0.5))
        with pytest.raises(ValueError, match="dp_rank=2"):
            engine.snapshots.publish(2, ComponentSnapshot(3, 10, 0.3, dp_rank=2))

        told = [item for item in await serving.ask("kv_dump", {"have": []}) if "batch" in item]
        (event,) = read_kv_events(EventBatch.from_bytes(told[0]["batch"]).events)
        assert list(event.hashes) == chain(local_hashes(prompt, 4))
        (load,) = await serving.ask("load_metrics")
        assert load["worker_stats"] == {
            "data_parallel_rank": 1,
            "request_active_slots": 0,
            "request_total_slots": 9,
        }
        assert load["kv_stats"]["kv_active_blocks"] == 3

        shown = {family.name: family for family in serving.runtime.metrics()}
        ((_, labels, value),) = shown["dynamo_component_gpu_cache_usage_percent"].samples
        assert (value, labels["dp_rank"], labels["dynamo_component"]) == (0.3, "1", "backend")
        assert shown["own_steps_total"].samples == [("own_steps_total", {"kind": "prefill"}, 7.0)]
        assert shown["dynamo_component_model_load_time_seconds"].samples


async def test_without_kv_routing_nothing_is_asked_for(serve: Serve) -> None:
    engine = RoutedEngine(kv_cache_block_size=4)
    async with serve(engine, enable_kv_routing=False) as serving:
        await serving.ask()
        assert not hasattr(engine, "publisher")
        assert not hasattr(engine, "snapshots")
        assert await serving.ask("load_metrics") == []


async def test_zmq_source_is_relayed(serve: Serve) -> None:
    server = KvEventServer()

    class WithSocket(TestedEngine):
        async def kv_event_sources(self) -> list[KvEventSource]:
            return [ZmqSource(server.endpoint)]

    try:
        async with serve(WithSocket(kv_cache_block_size=4)) as serving:
            await serving.ask()
            async with asyncio.timeout(WITHIN_S):
                while not [item for item in await serving.ask("kv_dump", {"have": []}) if "batch" in item]:
                    server.publish([block_stored([7], None, [1, 2, 3, 4])])
                    await asyncio.sleep(0.05)
    finally:
        await server.aclose()


async def test_health_check_reaches_the_engine(
    settings: dict[str, Any], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"health_check_enabled": True, "canary_wait_s": 0.05}
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", '{"token_ids": [4]}')
    checked = asyncio.Event()

    async def note(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        if is_probe(request) and request["token_ids"] == [4]:
            checked.set()
        yield LAST

    class Checked(TestedEngine):
        async def health_check_payload(self) -> dict[str, Any]:
            return build_health_check_payload(1)

    async with serve(Checked(note)), asyncio.timeout(WITHIN_S):
        await checked.wait()


async def test_engine_adds_to_its_trace(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", tracing.Tracer(provider))

    async def traced(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        telemetry.current_span(context).set_attribute("batch", 3)
        with telemetry.start_span(context, "load", blocks=8) as span:
            span.add_event("read")
        assert telemetry.engine_trace_kwargs(context) == {"trace_headers": context.trace_headers()}
        yield LAST

    async with serve(TestedEngine(traced)) as serving:
        await serving.ask()

        def ended() -> dict[str, ReadableSpan]:
            return {span.name: span for span in exporter.get_finished_spans()}

        await until(lambda: "engine" in ended())
    provider.shutdown()
    engine, load = ended()["engine"], ended()["load"]
    assert engine.attributes is not None
    assert load.attributes is not None
    assert (engine.attributes["batch"], load.attributes["blocks"]) == (3, 8)
    assert load.parent is not None
    assert engine.context is not None
    assert load.parent.span_id == engine.context.span_id


async def test_telemetry_without_traces_does_nothing(serve: Serve) -> None:
    async def untraced(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        telemetry.current_span(context).set_status("error", "none")
        with telemetry.start_span(context, "load") as span:
            span.set_attribute("blocks", 8)
        assert telemetry.engine_trace_kwargs(context) == {}
        yield LAST

    async with serve(TestedEngine(untraced)) as serving:
        assert len(await serving.ask()) == 1


# --------------------------------------------------------------------------- cancellation


async def leave_after_one(serving: Serving) -> None:
    async with await serving.caller.endpoint(ENDPOINT).client() as client:
        await client.wait_for_instances(WITHIN_S)
        call = await client.generate({"token_ids": [1]}, annotated=False)
        await anext(call)
        await call.aclose()


async def endless(request: Any, context: Context) -> AsyncGenerator[Any, None]:
    yield {"token_ids": [1]}
    await asyncio.Event().wait()


async def stops_itself(request: Any, context: Context) -> AsyncGenerator[Any, None]:
    """Stop the request before its caller leaves, which kills it, too."""
    yield {"token_ids": [1]}
    context.stop_generating()
    await asyncio.Event().wait()


async def test_abort_comes_once_when_the_caller_leaves(serve: Serve) -> None:
    engine = TestedEngine(stops_itself)
    async with serve(engine) as serving:
        await leave_after_one(serving)
        async with asyncio.timeout(WITHIN_S):
            await engine.aborted.wait()
        await serving.stop()
    assert engine.calls == ["start", "abort", "drain", "cleanup"]


async def test_answered_request_is_not_aborted(serve: Serve) -> None:
    engine = TestedEngine()
    async with serve(engine) as serving:
        await serving.ask()
        engine.contexts[0].kill()
        await serving.stop()
    assert "abort" not in engine.calls


async def test_engine_that_never_ends_is_cancelled(serve: Serve) -> None:
    ended = asyncio.Event()

    async def deaf(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        try:
            yield {"token_ids": [1]}
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serve(TestedEngine(deaf)) as serving:
        await leave_after_one(serving)
        async with asyncio.timeout(WITHIN_S):
            await ended.wait()


@pytest.mark.parametrize("kind", ["raises", "hangs"])
async def test_bad_abort_costs_its_request_only(
    serve: Serve, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class BadAbort(TestedEngine):
        async def abort(self, context: Context) -> None:
            self.answer = echo
            if kind == "hangs":
                await asyncio.Event().wait()
            raise RuntimeError("no such request")

    async with serve(BadAbort(endless)) as serving:
        await leave_after_one(serving)
        await until(lambda: "the engine's abort failed" in caplog.text)
        assert len(await serving.ask()) == 4


# --------------------------------------------------------------------------- bad engines


async def no_generator(request: Any, context: Context) -> None: ...


def items(*chunks: Any, error: Exception | None = None) -> Answer:
    async def answer(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        for chunk in chunks:
            yield chunk
        if error is not None:
            raise error

    return answer


BAD_ANSWERS: list[tuple[Answer, type[Exception], str]] = [
    (items("text"), HandlerFailed, "an item is a dict"),
    (items(None), HandlerFailed, "an item is a dict"),
    (items({}), HandlerFailed, "a list of token ids"),
    (items({"token_ids": "abc"}), HandlerFailed, "a list of token ids"),
    (items({"token_ids": [1.0]}), HandlerFailed, "a list of token ids"),
    (items({"token_ids": [True]}), HandlerFailed, "a list of token ids"),
    (items({"token_ids": [-1]}), HandlerFailed, "a list of token ids"),
    (items({"token_ids": [1 << 32]}), HandlerFailed, "a list of token ids"),
    (items({"token_ids": [], "finish_reason": 5}), HandlerFailed, "finish_reason=5"),
    (items({"token_ids": [1]}), EngineFailed, "without a finish_reason"),
    (items(), EngineFailed, "without a finish_reason"),
    (items(error=RuntimeError("out of memory")), HandlerFailed, "RuntimeError: out of memory"),
    (items(error=InvalidArgument("no images")), InvalidRequest, "no images"),
    (items(error=Disconnected("the engine's socket")), EngineFailed, "ConnectionLost: the engine"),
    (no_generator, HandlerFailed, "must be an async generator"),
    (lambda *_: [LAST], HandlerFailed, "must be an async generator"),
]


async def test_bad_answers_end_with_clear_errors(serve: Serve) -> None:
    engine = TestedEngine()
    async with serve(engine) as serving:
        for answer, error, message in BAD_ANSWERS:
            engine.answer = answer
            with pytest.raises(error, match=message):
                await serving.ask()
        engine.answer = echo
        assert len(await serving.ask()) == 4


async def ends_with(serve: Serve, engine: TestedEngine, **config: Any) -> BaseException | None:
    """Return the error with which the worker ends by itself."""
    async with serve(engine, **config) as serving:
        async with asyncio.timeout(WITHIN_S):
            await asyncio.wait([serving.task])
        return serving.task.exception()


async def test_start_that_raises_ends_the_worker(serve: Serve) -> None:
    class NoGpu(TestedEngine):
        async def start(self, worker_id: int) -> EngineConfig:
            raise OSError("no GPU")

    engine = NoGpu()
    error = await ends_with(serve, engine)
    assert isinstance(error, EngineFailed)
    assert str(error) == "the engine's start raised OSError: no GPU"
    assert engine.calls == ["drain", "cleanup"]


async def test_start_must_return_a_config(serve: Serve) -> None:
    class Silent(TestedEngine):
        async def start(self, worker_id: int) -> EngineConfig:
            return None  # type: ignore[return-value]

    error = await ends_with(serve, Silent())
    assert isinstance(error, EngineFailed)
    assert "must return an EngineConfig, not None" in str(error)


async def test_start_that_hangs_is_cancelled(serve: Serve) -> None:
    class Slow(TestedEngine):
        async def start(self, worker_id: int) -> EngineConfig:
            self.calls.append("start")
            await asyncio.Event().wait()
            raise AssertionError

    engine = Slow()
    async with serve(engine) as serving:
        await until(lambda: engine.calls)
        await serving.stop()
    assert engine.calls == ["start", "drain", "cleanup"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"total_kv_blocks": 0},
        {"kv_cache_block_size": "16"},
        {"context_length": True},
        {"data_parallel_size": 5000},
        {"data_parallel_start_rank": 2},
    ],
)
async def test_wrong_sizes_end_the_worker(serve: Serve, sizes: dict[str, Any]) -> None:
    error = await ends_with(serve, TestedEngine(**sizes))
    assert isinstance(error, ConfigError)
    assert next(iter(sizes)) in str(error)


async def test_model_must_be_a_directory_here(serve: Serve) -> None:
    error = await ends_with(serve, TestedEngine(), model_name="org/model")
    assert isinstance(error, ModelError)
    assert "nothing is downloaded" in str(error)


@pytest.mark.parametrize("source", ["socket", PushSource(print, dp_rank=3), ZmqSource("nowhere")])
async def test_wrong_kv_sources_end_the_worker(serve: Serve, source: Any) -> None:
    class Wrong(TestedEngine):
        async def kv_event_sources(self) -> list[KvEventSource]:
            return [source]

    assert isinstance(await ends_with(serve, Wrong(kv_cache_block_size=4)), ConfigError)


async def raise_in_cleanup() -> None:
    raise RuntimeError("still busy")


@pytest.mark.parametrize(
    ("cleanup", "message"),
    [
        (raise_in_cleanup, "raised RuntimeError: still busy"),
        (asyncio.Event().wait, "did not return within 1 s"),
    ],
)
async def test_bad_cleanup_ends_with_a_clear_error(
    serve: Serve, cleanup: Callable[[], Awaitable[Any]], message: str
) -> None:
    class Bad(TestedEngine):
        async def cleanup(self) -> None:
            await cleanup()

    async with serve(Bad()) as serving:
        await serving.ask()
        with pytest.raises(EngineFailed, match=message):
            await serving.stop()


async def test_bad_drain_is_followed_by_cleanup(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(TestedEngine):
        async def drain(self) -> None:
            raise RuntimeError("still busy")

    engine = Bad()
    async with serve(engine) as serving:
        await serving.ask()
        await serving.stop()
    assert engine.calls[-1] == "cleanup"
    assert "the engine's drain raised RuntimeError: still busy" in caplog.text


# --------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_input": ModelInput.Text}, "model_input"),
        ({"endpoint_types": "embedding"}, "endpoint_types"),
        ({"endpoint_types": ""}, "endpoint_types"),
        ({"disaggregation_mode": DisaggregationMode.PREFILL}, "disaggregation_mode"),
        ({"disaggregation_mode": "agg"}, "disaggregation_mode"),
        ({"route_to_encoder": True}, "route_to_encoder"),
        ({"reasoning_parser": "unheard"}, "reasoning_parser"),
        ({"media_decoder": object()}, "media_decoder"),
        ({"kv_state_endpoint": "a.b.c"}, "kv_state_endpoint"),
    ],
)
async def test_unserved_config_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        await Worker(TestedEngine(), WorkerConfig("dynamo", **config)).run()


async def test_engine_without_tokens_is_refused() -> None:
    class Images(DiffusionEngine):
        from_args = TestedEngine.from_args
        start, cleanup, generate = TestedEngine.start, TestedEngine.cleanup, TestedEngine.generate

    with pytest.raises(ConfigError, match="Images is no LLMEngine"):
        await Worker(Images(), WorkerConfig("dynamo")).run()


def test_config_is_read_from_parsed_arguments() -> None:
    class Parsed:
        namespace = "own"
        component = None
        disaggregation_mode = "agg"
        dyn_tool_call_parser = "hermes"
        health_check_payload = '{"token_ids": [1]}'

    config = WorkerConfig.from_runtime_config(Parsed(), "path", "name", request_plane="http")
    assert config == WorkerConfig(
        "own",
        model_name="path",
        served_model_name="name",
        request_plane="http",
        tool_call_parser="hermes",
        health_check_payload={"token_ids": [1], "_HEALTH_CHECK": True},
    )
