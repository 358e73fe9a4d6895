"""A worker: serves an engine and registers it with its model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from dynamo_redis.config import ModelSettings
from dynamo_redis.engines.availability import follow_health
from dynamo_redis.engines.base import Engine, EngineCapacity
from dynamo_redis.engines.demo_model import DEMO_MODEL_NAME, DEMO_MODEL_PATH
from dynamo_redis.engines.engine_span import with_engine_span
from dynamo_redis.engines.load_reports import load_metrics, report_load
from dynamo_redis.errors import ModelError, StoreError
from dynamo_redis.events.load_publisher import LoadPublisher
from dynamo_redis.events.worker_events import WorkerEvents
from dynamo_redis.models.card import ModelCard, ModelKind, RuntimeConfig
from dynamo_redis.models.directory import ModelDirectory, read_model_directory
from dynamo_redis.models.upload import keep_model_files, make_card, publish_model
from dynamo_redis.names import EndpointName
from dynamo_redis.parsers.detection import AUTO
from dynamo_redis.runtime.handlers import AnyHandler
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.store.base import Registration
from dynamo_redis.supervision import supervised
from dynamo_redis.wire.topics import CLEAR_KV_BLOCKS, LOAD_METRICS

log = logging.getLogger(__name__)

CAPACITY_S = 1.0
"""Seconds between two comparisons of an engine's capacity with its card."""


def kind_of(settings: ModelSettings) -> ModelKind | None:
    """Return the kind of requests of the settings; None: all that the model's files allow."""
    return None if settings.model_type == "auto" else settings.model_type


def open_model(settings: ModelSettings) -> tuple[ModelDirectory, str]:
    """Return the model of the settings and its name in requests; the demo model if they have no path.

    Blocks while it reads the files and tries the chat templates, as a frontend will do: a model that
    frontends cannot use must not be registered. Raises ModelError.
    """
    path = settings.model_path or DEMO_MODEL_PATH
    default_name = DEMO_MODEL_NAME if settings.model_path is None else path.resolve().name
    model = read_model_directory(path, context_length=settings.context_length)
    if settings.matryoshka != "auto":
        model = replace(model, matryoshka=settings.matryoshka == "true")
    if model.chat_templates and settings.model_type != "embedding":
        from dynamo_redis.models.chat_template import ChatTemplate  # needs the extra `http`

        try:
            ChatTemplate(model.chat_templates, model.tokenizer_config).check()
        except ModelError as exc:
            raise ModelError(f"{path}: {exc}") from exc
    return model, settings.model_name or default_name


async def serve_engine(
    runtime: DistributedRuntime,
    engine: Engine,
    model: ModelDirectory,
    *,
    endpoint: str,
    model_name: str,
    migration_limit: int = 0,
    model_type: ModelKind | None = None,
    metrics_labels: list[tuple[str, str]] | None = None,
    health_check_payload: dict[str, Any] | None = None,
    tool_call_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    modalities: str | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the engine at `endpoint` (`namespace.component.generate`) until the runtime shuts down.

    The order at the start: the engine starts; its KV events are published; the other endpoints of the
    component open (`kv_dump`, `clear_kv_blocks`, `load_metrics` and the engine's own); the endpoint opens and
    its instance is registered; the model's files are uploaded and its card is registered; `on_ready` is
    called. A card always has an instance that serves it, and an instance can always be asked for its blocks.
    While the engine is down, the instance is unregistered. When its capacity changes, the card is updated.

    The shutdown has the reverse order: the card is withdrawn, and all instances with it; requests under way
    finish within the drain time; pending events are sent, for a second at most; the engine closes. A failure
    at the start is undone in the same order. With `DYN_EVENT_PLANE=none` nothing is published, and there is
    no `kv_dump`.

    Raises ConfigError, ModelError or StoreError.

    Args:
        runtime: the process's runtime; this starts it.
        engine: the engine, not started yet; this closes it.
        model: the model's files.
        endpoint: the endpoint's whole name.
        model_name: the model's name in requests.
        migration_limit: how often an answer may go on at another worker after its worker was lost.
        model_type: the kinds of request; None: all that the model's files allow.
        metrics_labels, health_check_payload: of `generate`, as `Endpoint.serve_endpoint` takes them.
        tool_call_parser: the format of the tool calls in answers, by Dynamo's name; `auto`: by the model's
            chat template.
        reasoning_parser: the format of the reasoning in answers, likewise.
        modalities: the parts beside text that the engine reads in `GenerateRequest.chat`, such as
            `audio,image`.
        on_ready: called with a line of text for the user when callers can find the model.
    """
    name = EndpointName.parse(endpoint)
    await runtime.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.aclose)
        await engine.start()
        if runtime.settings.events.event_plane != "none":
            await _publish(runtime, engine, name, stack)
        await _serve_beside(runtime, engine, name, stack)
        generate = runtime.endpoint(endpoint)
        served = await generate.start_serving(
            with_engine_span(engine.generate),
            metrics_labels=metrics_labels,
            health_check_payload=health_check_payload,
        )
        stack.push_async_callback(served.unregister)
        fixed = RuntimeConfig(
            event_plane=runtime.settings.events.event_plane,
            tool_call_parser=None if tool_call_parser == AUTO else tool_call_parser,
            reasoning_parser=None if reasoning_parser == AUTO else reasoning_parser,
            modalities=modalities.split(",") if modalities else None,
        )
        follower = CardFollower(engine, model, model_name, fixed, migration_limit, model_type)
        card = follower.first_card()
        registration = await publish_model(runtime, name, model, card)
        stack.push_async_callback(runtime.leave, registration)

        async def keep_files() -> None:
            await keep_model_files(runtime.objects, model, card, lambda: runtime.registry.process_count)

        for task, work in (
            (f"card of model {model_name}", lambda: follower.run(registration)),
            (f"files of model {model_name}", keep_files),
            (f"health of {name}", lambda: follow_health(generate, engine)),
        ):
            await stack.enter_async_context(supervised(log, task, work))
        log.info("serving model %s at %s, instance %x", model_name, name, runtime.instance_id)
        if on_ready is not None:
            on_ready(f"{model_name} at {name}, instance {runtime.instance_id:x}")
        await runtime.wait_for_shutdown()


async def _publish(
    runtime: DistributedRuntime, engine: Engine, name: EndpointName, stack: AsyncExitStack
) -> None:
    """Publish the engine's KV events and its load until the stack is closed."""
    capacity = engine.capacity
    events = WorkerEvents(runtime, name.namespace, name.component, block_size=capacity.kv_block_size)
    stack.push_async_callback(events.aclose)
    engine.follow([events.rank(dp_rank) for dp_rank in range(capacity.data_parallel_size)])
    await events.start()
    load = LoadPublisher(runtime.events, name.namespace, name.component, runtime.instance_id)
    stack.push_async_callback(load.aclose)
    load.start()
    await stack.enter_async_context(
        supervised(log, f"load reports of {name}", lambda: report_load(engine, load))
    )


async def _serve_beside(
    runtime: DistributedRuntime, engine: Engine, name: EndpointName, stack: AsyncExitStack
) -> None:
    """Serve the worker's other endpoints until the stack is closed."""

    async def clear_kv_blocks(_: Any) -> dict[str, Any]:
        return {"status": "success", "cleared": await engine.clear_kv_blocks()}

    handlers: dict[str, AnyHandler] = {
        CLEAR_KV_BLOCKS: clear_kv_blocks,
        LOAD_METRICS: load_metrics(engine),
        **engine.endpoints(),
    }
    for endpoint, handler in handlers.items():
        beside = EndpointName(name.namespace, name.component, endpoint)
        served = await runtime.endpoint(str(beside)).start_serving(handler, graceful_shutdown=False)
        stack.push_async_callback(served.unregister)


class CardFollower:
    """Makes the card of a model on an engine, and updates it when the engine comes back with another
    capacity."""

    def __init__(
        self,
        engine: Engine,
        model: ModelDirectory,
        model_name: str,
        fixed: RuntimeConfig,
        migration_limit: int,
        model_type: ModelKind | None = None,
    ) -> None:
        """`fixed` has the fields of the card that do not depend on the capacity."""
        self._engine = engine
        self._model = model
        self._model_name = model_name
        self._fixed = fixed
        self._migration_limit = migration_limit
        self._model_type = model_type
        self._published = engine.capacity

    def first_card(self) -> ModelCard:
        """Return the card for the capacity that the engine had when this object was made."""
        return self._card_of(self._published)

    async def run(self, registration: Registration) -> None:
        """Compare the engine's capacity with the registered card every `CAPACITY_S`. Runs until cancelled."""
        while True:
            await asyncio.sleep(CAPACITY_S)
            capacity = self._engine.capacity
            if capacity == self._published:
                continue
            card = self._card_of(capacity)
            try:
                await registration.update(card.to_bytes())
            except StoreError as exc:
                log.warning(
                    "the card of model %s cannot be updated to its engine's capacity yet: %s",
                    card.display_name,
                    exc,
                )
                continue
            log.warning(
                "the card of model %s has its engine's new capacity: context %d, blocks of %d tokens",
                card.display_name,
                card.context_length,
                card.kv_cache_block_size,
            )
            self._published = capacity

    def _card_of(self, capacity: EngineCapacity) -> ModelCard:
        model = self._model
        length = capacity.context_length or model.context_length
        if length != model.context_length:
            log.info("model %s: the context length is the engine's, %d tokens", self._model_name, length)
            model = replace(model, context_length=length)
        return make_card(
            model,
            model_name=self._model_name,
            model_type=self._model_type,
            migration_limit=self._migration_limit,
            kv_cache_block_size=capacity.kv_block_size,
            runtime_config=self._fixed.model_copy(
                update={
                    "total_kv_blocks": capacity.total_kv_blocks,
                    "max_num_seqs": capacity.max_num_seqs,
                    "max_num_batched_tokens": capacity.max_num_batched_tokens,
                    "data_parallel_size": capacity.data_parallel_size,
                }
            ),
        )
