"""`dynamo-redis router`: the KV-aware router as a service for several frontends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from dynamo_redis.cli.options import SettingsCommand, load, setting_options
from dynamo_redis.cli.service import announce_ready, run_service, runtime_options
from dynamo_redis.config import RouterSettings, RuntimeSettings
from dynamo_redis.names import EndpointName

if TYPE_CHECKING:
    from dynamo_redis.runtime.runtime import DistributedRuntime


@click.command("router", cls=SettingsCommand)
@click.option(
    "--endpoint",
    metavar="NAME",
    help="Workers to choose among, as namespace.component.endpoint.  "
    "[default DYN_NAMESPACE.backend.generate]",
)
@click.option(
    "--component",
    metavar="NAME",
    default="router",
    help="Name of the service in the workers' namespace. Each router service needs its own name if several "
    "choose among different workers.  "
    "[default router]",
)
@setting_options(RouterSettings)
@runtime_options
def router(endpoint: str | None, component: str, **options: str | None) -> None:
    """Choose workers for frontends by the contents of the workers' KV caches, and forward requests.

    It serves NAMESPACE.router.generate, which forwards a request to the chosen worker and streams the answer
    back, and NAMESPACE.router.best_worker_id, which only chooses. Frontends use it with --router-mode kv
    --router-endpoint NAMESPACE.router.generate, and keep no index of their own. Several routers may run:
    they share the requests under way. Without --kv-cache-block-size the size of blocks is that of the first
    worker.

    \b
    Examples:
      dynamo-redis router
      dynamo-redis router --endpoint dynamo.prefill.generate --component prefill-router
      dynamo-redis frontend --router-mode kv --router-endpoint dynamo.router.generate
    """
    settings = load(RouterSettings, options)
    workers = EndpointName.parse(endpoint or f"{load(RuntimeSettings, options).namespace}.backend.generate")
    service_name = EndpointName(workers.namespace, component, "generate")

    async def serve(runtime: DistributedRuntime) -> None:
        from dynamo_redis.router.kv_router import KvRouter
        from dynamo_redis.router.service import RouterService

        kv_router = KvRouter(runtime, workers, settings)
        shutdown = asyncio.create_task(runtime.wait_for_shutdown())
        starting = asyncio.create_task(kv_router.start())
        try:
            await asyncio.wait({starting, shutdown}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return
            await starting
            served = await RouterService(kv_router).serve(runtime, component)
            announce_ready(f"{service_name}, choosing among {workers}")
            await shutdown
            await asyncio.gather(*(endpoint.unregister() for endpoint in served))
        finally:
            for task in (starting, shutdown):
                task.cancel()
            await asyncio.gather(starting, shutdown, return_exceptions=True)
            await kv_router.aclose()

    run_service("router", options, serve)
