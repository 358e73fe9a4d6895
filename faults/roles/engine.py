"""A worker of a whole deployment: the mock engine, discovered and called as an engine is."""

from __future__ import annotations

import asyncio

from dynamo_redis.config import MockEngineSettings, ModelSettings
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.engines.worker import open_model, serve_engine
from dynamo_redis.names import format_instance_id
from dynamo_redis.runtime import DistributedRuntime, Settings
from faults.roles.base import Process

ENDPOINT = "dynamo.backend.generate"
DRAIN_S = 2.0


def open_runtime(process: Process) -> DistributedRuntime:
    """Return a runtime by the process's orders, on loopback."""
    given = Settings.load(drain_s=DRAIN_S, tcp_host="127.0.0.1")
    return DistributedRuntime(
        settings=Settings(store=process.settings(), plane=given.plane, runtime=given.runtime)
    )


async def run(process: Process) -> None:
    """Serve until the end."""
    model, model_name = await asyncio.to_thread(open_model, ModelSettings.load())
    async with open_runtime(process) as runtime:
        lease = format_instance_id(runtime.instance_id)
        await serve_engine(
            runtime,
            MockEngine(MockEngineSettings.load(), model),
            model,
            endpoint=ENDPOINT,
            model_name=model_name,
            on_ready=lambda _: process.recorder.note("started", role="worker", lease=lease),
        )
