"""A worker: an engine, made known and served."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dynamo_redis.config import ModelSettings
from dynamo_redis.engines.base import Engine, EngineCapacity
from dynamo_redis.engines.demo_model import DEMO_MODEL_NAME, DEMO_MODEL_PATH
from dynamo_redis.errors import ModelError
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime.chat_template import ChatTemplate
from dynamo_redis.runtime.model_card import RuntimeConfig
from dynamo_redis.runtime.model_files import ModelDirectory, publish_model, read_model_directory
from dynamo_redis.runtime.runtime import DistributedRuntime

log = logging.getLogger(__name__)


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
            ChatTemplate(model.chat_templates, model.tokenizer_config)
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

    In order: the engine starts, the endpoint opens and its instance is registered, the model's files are
    uploaded and its card is registered, `on_ready` is told. So a card always has an instance that serves it.
    At shutdown the reverse: the card goes, then the instance; requests under way finish within the drain
    time; the engine closes. What fails on the way in is undone the same way.

    Raises ConfigError, ModelError or StoreError.
    """
    name = EndpointName.parse(endpoint)
    await runtime.start()
    try:
        await engine.start()
        served = await runtime.endpoint(endpoint).start_serving(engine.generate)
        try:
            card = await publish_model(
                runtime,
                name,
                model,
                model_name=model_name,
                kv_cache_block_size=engine.capacity.kv_block_size,
                runtime_config=_runtime_config(engine.capacity),
            )
            try:
                log.info("serving model %s at %s, instance %x", model_name, name, runtime.instance_id)
                if on_ready is not None:
                    on_ready(f"{model_name} at {name}, instance {runtime.instance_id:x}")
                await runtime.wait_for_shutdown()
            finally:
                await runtime.leave(card)
        finally:
            await served.unregister()
    finally:
        await engine.aclose()


def _runtime_config(capacity: EngineCapacity) -> RuntimeConfig:
    return RuntimeConfig(
        total_kv_blocks=capacity.total_kv_blocks,
        max_num_seqs=capacity.max_num_seqs,
        max_num_batched_tokens=capacity.max_num_batched_tokens,
    )
