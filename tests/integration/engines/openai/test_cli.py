"""`dynamo-redis worker openai` as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from tests.integration.engines.conftest import ENDPOINT, Deployment
from tests.integration.engines.openai_engine import running_engine


@asynccontextmanager
async def worker(
    url: str, redis_url: str, prefix: str, *options: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {
        "DYN_REDIS_URL": redis_url,
        "DYN_REDIS_PREFIX": prefix,
        "DYN_ENGINE_POLL_INTERVAL_S": "50ms",
    }
    arguments = ["-m", "dynamo_redis", "worker", "openai", "--engine-url", url, "--model-name", "demo"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        *options,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def end(process: asyncio.subprocess.Process) -> int:
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        return await process.wait()


async def test_worker_waits_for_its_engine_and_serves_it(
    dynamo_redis_url: str, dynamo_redis_prefix: str, deployment: Deployment
) -> None:
    async with running_engine() as engine:
        engine.fail_with = (503, {})  # still loading
        async with worker(engine.url, dynamo_redis_url, dynamo_redis_prefix) as process:
            assert process.stderr is not None
            assert process.stdout is not None
            async with asyncio.timeout(30):
                while b"waiting for the engine" not in await process.stderr.readline():
                    pass
            engine.fail_with = None
            async with asyncio.timeout(30):
                assert (await process.stdout.readline()).startswith(b"ready demo at dynamo.backend.generate")
            async with deployment.runtime() as runtime:
                client = await runtime.endpoint(ENDPOINT).client()
                assert len(client.instance_ids()) == 1
                assert await end(process) == 0
                async with asyncio.timeout(30):
                    while client.instance_ids():
                        await asyncio.sleep(0.01)


async def test_worker_that_waits_for_its_engine_can_be_ended(
    dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    closed_url = "http://127.0.0.1:9"
    async with worker(closed_url, dynamo_redis_url, dynamo_redis_prefix) as process:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while b"waiting for the engine" not in await process.stderr.readline():
                pass
        assert await end(process) == 0


@pytest.mark.parametrize("options", [[], ["--model-path", str(DEMO_MODEL_PATH)]])
async def test_missing_model_path_is_warned_of(
    dynamo_redis_url: str, dynamo_redis_prefix: str, options: list[str]
) -> None:
    """The engine gets token ids of this model's tokenizer: both must be of one model."""
    closed_url = "http://127.0.0.1:9"
    said = b""
    async with worker(closed_url, dynamo_redis_url, dynamo_redis_prefix, *options) as process:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while b"waiting for the engine" not in said:
                said += await process.stderr.readline()
    assert (b"DYN_MODEL_PATH (--model-path) is not set" in said) == (not options)
