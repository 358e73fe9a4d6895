"""`dynamo-redis frontend`: the OpenAI-compatible HTTP server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dynamo_redis.cli.options import SettingsCommand, load, setting_options
from dynamo_redis.cli.service import announce_ready, run_service, runtime_options
from dynamo_redis.config import FrontendSettings, PlaneSettings, RouterSettings

if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime


@click.command("frontend", cls=SettingsCommand)
@setting_options(FrontendSettings)
@setting_options(RouterSettings)
@runtime_options
def frontend(**options: str | None) -> None:
    """Serve the OpenAI API for all models in the registry: chat and text completions, /v1/models, /health.

    It needs no model files: it fetches the tokenizer and template of each model from Redis. Any number of
    frontends may run. At SIGTERM or Ctrl-C, requests under way finish first.

    \b
    Examples:
      dynamo-redis frontend
      dynamo-redis frontend --redis-url redis://10.0.0.5:6379 --http-port 8000
      DYN_REDIS_URL=redis://10.0.0.5 dynamo-redis frontend --router-mode least_loaded
      dynamo-redis frontend --router-mode kv
      dynamo-redis frontend --router-mode kv --router-endpoint dynamo.router.generate
    """
    settings = load(FrontendSettings, options)
    router_settings = load(RouterSettings, options)
    load(PlaneSettings, options).require_one_plane()

    async def serve(runtime: DistributedRuntime) -> None:
        from dynamo_redis.frontend.http.server import serve_frontend

        await serve_frontend(runtime, settings, router_settings, on_ready=announce_ready)

    run_service("frontend", options, serve)
