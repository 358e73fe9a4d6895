"""A worker: an engine, made known and served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from dynamo_redis.config import ModelSettings
from dynamo_redis.engines.availability import follow_health
from dynamo_redis.engines.base import Engine, EngineCapacity
from dynamo_redis.engines.demo_model import DEMO_MODEL_NAME, DEMO_MODEL_PATH
from dynamo_redis.engines.load_reports import load_metrics, report_load
from dynamo_redis.errors import ModelError, StoreError
from dynamo_redis.events.load_publisher import LoadPublisher
from dynamo_redis.events.worker_events import WorkerEvents
from dynamo_redis.models.card import ModelCard, RuntimeConfig
from dynamo_redis.models.chat_template import ChatTemplate
from dynamo_redis.models.files import (
    ModelDirectory,
    keep_model_files,
    make_card,
    publish_model,
    read_model_directory,
)
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime.handlers import AnyHandler
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.store.base import Registration
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.topics import CLEAR_KV_BLOCKS, LOAD_METRICS

log = logging.getLogger(__name__)

CAPACITY_S = 1.0
"""Pause between two comparisons of an engine's capacity with its card."""


def open_model(settings: ModelSettings) -> tuple[ModelDirectory, str]:
    """The model to serve and its name in requests, by the settings; the demo model if they name none.

    Blocks while the files are read and the chat templates tried, just as a frontend will do: what it could
    not use is not to be registered. Raises ModelError.
    """
    path = settings.model_path or DEMO_MODEL_PATH
    default_name = DEMO_MODEL_NAME if settings.model_path is None else path.resolve().name
    model = read_model_directory(path, context_length=settings.context_length)
    if model.chat_templates:
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
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the engine at `endpoint` (`namespace.component.generate`) until the runtime shuts down.

    In order: the engine starts, its KV events have somewhere to go, what stands beside the endpoint opens
    (`kv_dump`, `clear_kv_blocks`, `load_metrics` and the engine's own), the endpoint opens and its instance
    is registered, the model's files are uploaded and its card is registered, `on_ready` is told. So a card
    always has an instance that serves it, and an instance can always be asked for what it holds. While the
    engine is down the instance is not registered; when its capacity changes, the card follows.

    At shutdown the reverse: the card goes and all instances with it; requests under way finish within the
    drain time; events that wait are sent, for a second at most; the engine closes. What fails on the way in
    is undone the same way. With `DYN_EVENT_PLANE=none` nothing is published, and there is no `kv_dump`.

    Raises ConfigError, ModelError or StoreError.
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
        served = await generate.start_serving(engine.generate)
        stack.push_async_callback(served.unregister)

        def card_of(capacity: EngineCapacity) -> ModelCard:
            return _card(model, model_name, capacity, runtime.settings.events.event_plane)

        capacity = engine.capacity
        card = card_of(capacity)
        registration = await publish_model(runtime, name, model, card)
        stack.push_async_callback(runtime.leave, registration)
        files, health = f"files of model {model_name}", f"health of {name}"
        follower = CardFollower(engine, registration, card_of, capacity)
        await stack.enter_async_context(_running(follower.run, f"card of model {model_name}"))
        await stack.enter_async_context(
            _running(lambda: keep_model_files(runtime.objects, model, card), files)
        )
        await stack.enter_async_context(_running(lambda: follow_health(generate, engine), health))
        log.info("serving model %s at %s, instance %x", model_name, name, runtime.instance_id)
        if on_ready is not None:
            on_ready(f"{model_name} at {name}, instance {runtime.instance_id:x}")
        await runtime.wait_for_shutdown()


async def _publish(
    runtime: DistributedRuntime, engine: Engine, name: EndpointName, stack: AsyncExitStack
) -> None:
    """Let the engine's KV events and its load reach routers, until the stack is left."""
    capacity = engine.capacity
    events = WorkerEvents(runtime, name.namespace, name.component, block_size=capacity.kv_block_size)
    stack.push_async_callback(events.aclose)
    engine.follow([events.rank(dp_rank) for dp_rank in range(capacity.data_parallel_size)])
    await events.start()
    load = LoadPublisher(
        runtime.events, runtime.registry, name.namespace, name.component, runtime.instance_id
    )
    stack.push_async_callback(load.aclose)
    load.start()
    await stack.enter_async_context(_running(lambda: report_load(engine, load), f"load reports of {name}"))


async def _serve_beside(
    runtime: DistributedRuntime, engine: Engine, name: EndpointName, stack: AsyncExitStack
) -> None:
    """Serve what is asked of the worker beside answers, until the stack is left."""
    handlers: dict[str, AnyHandler] = {
        CLEAR_KV_BLOCKS: _clear_kv_blocks(engine),
        LOAD_METRICS: load_metrics(engine),
        **engine.endpoints(),
    }
    for endpoint, handler in handlers.items():
        beside = EndpointName(name.namespace, name.component, endpoint)
        served = await runtime.endpoint(str(beside)).start_serving(handler, graceful_shutdown=False)
        stack.push_async_callback(served.unregister)


def _clear_kv_blocks(engine: Engine) -> Callable[[Any], Awaitable[dict[str, Any]]]:
    async def clear(_: Any) -> dict[str, Any]:
        return {"status": "success", "cleared": await engine.clear_kv_blocks()}

    return clear


@asynccontextmanager
async def _running(work: Callable[[], Awaitable[None]], what: str) -> AsyncIterator[None]:
    """Do it in a task that ends with the block. Whenever it fails, that is logged, and it begins again."""
    task = asyncio.create_task(Supervisor(log, what).run(work), name=what)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


class CardFollower:
    """Keeps a model's card true to an engine that came back with other capacities than it had."""

    def __init__(
        self,
        engine: Engine,
        registration: Registration,
        card_of: Callable[[EngineCapacity], ModelCard],
        published: EngineCapacity,
    ) -> None:
        self._engine = engine
        self._registration = registration
        self._card_of = card_of
        self._published = published

    async def run(self) -> None:
        """Look at the engine's capacity each `CAPACITY_S`. Runs until cancelled."""
        while True:
            await asyncio.sleep(CAPACITY_S)
            capacity = self._engine.capacity
            if capacity == self._published:
                continue
            card = self._card_of(capacity)
            try:
                await self._registration.update(card.to_bytes())
            except StoreError as exc:
                log.warning("the card of model %s cannot follow its engine yet: %s", card.display_name, exc)
                continue
            log.warning(
                "the card of model %s follows its engine: context %d, blocks of %d tokens",
                card.display_name,
                card.context_length,
                card.kv_cache_block_size,
            )
            self._published = capacity


def _card(model: ModelDirectory, model_name: str, capacity: EngineCapacity, event_plane: str) -> ModelCard:
    length = capacity.context_length or model.context_length
    if length != model.context_length:
        log.info("model %s: the engine's context of %d tokens counts", model_name, length)
        model = replace(model, context_length=length)
    return make_card(
        model,
        model_name=model_name,
        kv_cache_block_size=capacity.kv_block_size,
        runtime_config=RuntimeConfig(
            total_kv_blocks=capacity.total_kv_blocks,
            max_num_seqs=capacity.max_num_seqs,
            max_num_batched_tokens=capacity.max_num_batched_tokens,
            data_parallel_size=capacity.data_parallel_size,
            event_plane=event_plane,
        ),
    )
