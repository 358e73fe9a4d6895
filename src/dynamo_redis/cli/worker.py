"""`dynamo-redis worker`: processes that serve a model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from dynamo_redis.cli.options import SettingsCommand, load, setting_options
from dynamo_redis.cli.service import announce_ready, run_service, runtime_options
from dynamo_redis.cli.worker_openai import openai
from dynamo_redis.config import MockEngineSettings, ModelSettings, RuntimeSettings
from dynamo_redis.names import EndpointName

if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime


@click.group("worker")
def worker() -> None:
    """A worker that serves a model: it registers itself and uploads the model's small files."""


worker.add_command(openai)


@worker.command("mock", cls=SettingsCommand)
@click.option(
    "--endpoint",
    metavar="NAME",
    help="Endpoint to serve, as namespace.component.endpoint.  [default DYN_NAMESPACE.backend.generate]",
)
@setting_options(ModelSettings)
@setting_options(MockEngineSettings)
@runtime_options
def mock(endpoint: str | None, **options: str | None) -> None:
    """Serve a model with the mock engine: real tokens, a KV cache and the timing of a GPU, but no GPU.

    Without --model-path it serves a small demo model. It publishes the contents of its KV cache and its load
    for routers, unless --event-plane is none. At SIGTERM or Ctrl-C the worker leaves the registry at once,
    and requests under way finish.

    \b
    Examples:
      dynamo-redis worker mock
      dynamo-redis worker mock --model-path ./Qwen3-0.6B --model-name Qwen/Qwen3-0.6B
      dynamo-redis worker mock --speedup-ratio 0 --redis-url redis://10.0.0.5:6379
      dynamo-redis worker mock --data-parallel-size 4 --total-kv-blocks 4096
      dynamo-redis worker mock --model-type embedding --model-name embedder
    """
    model_settings = load(ModelSettings, options)
    engine_settings = load(MockEngineSettings, options)
    name = EndpointName.parse(endpoint or f"{load(RuntimeSettings, options).namespace}.backend.generate")

    async def serve(runtime: DistributedRuntime) -> None:
        from dynamo_redis.engines.mock.embedding import MockEmbeddingEngine
        from dynamo_redis.engines.mock.engine import MockEngine
        from dynamo_redis.engines.worker import kind_of, open_model, serve_engine

        model, model_name = await asyncio.to_thread(open_model, model_settings)
        kind = kind_of(model_settings)
        await serve_engine(
            runtime,
            (MockEmbeddingEngine if kind == "embedding" else MockEngine)(engine_settings, model),
            model,
            endpoint=str(name),
            model_name=model_name,
            model_type=kind,
            migration_limit=model_settings.model_migration_limit,
            tool_call_parser=model_settings.tool_call_parser,
            reasoning_parser=model_settings.reasoning_parser,
            on_ready=announce_ready,
        )

    run_service("worker", options, serve)
