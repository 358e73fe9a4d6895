"""`dynamo-redis worker openai`: any OpenAI-compatible server behind the frontend."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import click

from dynamo_redis.cli.failures import require_extra
from dynamo_redis.cli.options import SettingsCommand, load, setting_options
from dynamo_redis.cli.service import announce_ready, run_service, runtime_options
from dynamo_redis.config import ModelSettings, OpenAIEngineSettings, RuntimeSettings
from dynamo_redis.names import EndpointName

if TYPE_CHECKING:
    from dynamo_redis.engines.openai.engine import OpenAIEngine
    from dynamo_redis.runtime.runtime import DistributedRuntime

log = logging.getLogger(__name__)


@click.command("openai", cls=SettingsCommand)
@click.option(
    "--endpoint",
    metavar="NAME",
    help="Endpoint to serve, as namespace.component.endpoint.  [default DYN_NAMESPACE.backend.generate]",
)
@setting_options(ModelSettings)
@setting_options(OpenAIEngineSettings)
@runtime_options
def openai(endpoint: str | None, **options: str | None) -> None:
    """Serve the model of a running engine: vLLM, SGLang, llama.cpp's server, or any other with OpenAI's
    completions API.

    Prompts go to the engine as token ids, answers stream back, and a cancelled request ends at the engine at
    once. While the engine does not answer, this worker is not in the registry. Routers know the contents of
    the engine's KV cache by its KV events: vLLM and SGLang are asked where they publish them, and
    --kv-events-endpoint says it for versions without an answer. --model-path names the model's directory with
    its tokenizer; the worker does not need the weights.

    \b
    Examples:
      vllm serve ./Qwen3-8B --port 8001 --enable-prefix-caching --kv-events-config \\
        '{"enable_kv_cache_events": true, "publisher": "zmq",
          "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}'
      dynamo-redis worker openai --model-path ./Qwen3-8B --engine-url http://127.0.0.1:8001 \\
        --kv-events-endpoint tcp://127.0.0.1:5557 --kv-replay-endpoint tcp://127.0.0.1:5558
    \b
      python -m sglang.launch_server --model-path ./Qwen3-8B --port 30000 --page-size 16 \\
        --enable-metrics --kv-events-config '{"publisher": "zmq", "endpoint": "tcp://*:5557"}'
      dynamo-redis worker openai --model-path ./Qwen3-8B --engine-url http://127.0.0.1:30000
    \b
      llama-server -m qwen3-8b.gguf --port 8080 --metrics
      dynamo-redis worker openai --model-path ./Qwen3-8B --engine-url http://127.0.0.1:8080
    \b
      vllm serve ./Qwen3-Embedding-0.6B --port 8001
      dynamo-redis worker openai --model-path ./Qwen3-Embedding-0.6B --model-type embedding
    """
    require_extra("engines")
    model_settings = load(ModelSettings, options)
    engine_settings = load(OpenAIEngineSettings, options)
    name = EndpointName.parse(endpoint or f"{load(RuntimeSettings, options).namespace}.backend.generate")

    async def serve(runtime: DistributedRuntime) -> None:
        from dynamo_redis.engines.openai.embedding import OpenAIEmbeddingEngine
        from dynamo_redis.engines.openai.engine import OpenAIEngine
        from dynamo_redis.engines.worker import kind_of, open_model, serve_engine

        if model_settings.model_path is None:
            log.warning(
                "DYN_MODEL_PATH (--model-path) is not set: prompts are tokenized by the demo model's "
                "tokenizer, which is wrong for an engine with any other model: set it to the model's "
                "directory"
            )
        model, model_name = await asyncio.to_thread(open_model, model_settings)
        kind = kind_of(model_settings)
        engine_class = OpenAIEmbeddingEngine if kind == "embedding" else OpenAIEngine
        engine = engine_class(engine_settings, model, context_length=model_settings.context_length)
        if await _is_up(engine, runtime):
            await serve_engine(
                runtime,
                engine,
                model,
                endpoint=str(name),
                model_name=model_name,
                model_type=kind,
                migration_limit=model_settings.model_migration_limit,
                tool_call_parser=model_settings.tool_call_parser,
                reasoning_parser=model_settings.reasoning_parser,
                modalities=engine_settings.engine_modalities,
                on_ready=announce_ready,
            )

    run_service("worker", options, serve)


async def _is_up(engine: OpenAIEngine, runtime: DistributedRuntime) -> bool:
    """Wait until the engine has loaded. Return False if this process is asked to end before."""
    up = asyncio.create_task(engine.wait_until_up(), name="wait for the engine")
    leaving = asyncio.create_task(runtime.wait_for_shutdown(), name="wait for shutdown")
    try:
        await asyncio.wait((up, leaving), return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            up.result()
            return True
        return False
    finally:
        up.cancel()
        leaving.cancel()
        await asyncio.wait((up, leaving))
        if not up.done() or up.cancelled() or up.exception():
            await engine.aclose()
