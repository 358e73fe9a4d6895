"""All parts together: real Redis, real workers with the mock engine, the official client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from redis import Redis

from dynamo_redis.errors import ConfigError
from dynamo_redis.frontend.http.port import bind
from tests.frontend_deployment import Deployment, Process, until_healthy

MESSAGES: Any = [{"role": "user", "content": "Hello!"}]


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chats_with_workers_found_through_redis(deployment: Deployment) -> None:
    url = await deployment.frontend()
    assert (await until_healthy(url, 0))["status"] == "unhealthy"
    await deployment.worker()
    await deployment.worker()
    await until_healthy(url, 2)
    async with client_of(url) as client:
        assert [model.id async for model in client.models.list()] == ["demo"]
        whole = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=30)
        stream = await client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content != ""
        assert whole.usage is not None
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        limited = await client.completions.create(
            model="demo", prompt=["a", "b"], max_tokens=7, extra_body={"ignore_eos": True}
        )
        assert [choice.finish_reason for choice in limited.choices] == ["length", "length"]
        assert limited.usage is not None
        assert limited.usage.completion_tokens == 14


async def test_a_hang_up_reaches_the_engine(deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=1)
    url = await deployment.frontend()
    await until_healthy(url)
    async with client_of(url) as client:
        stream = await client.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, max_tokens=20_000, extra_body={"ignore_eos": True}
        )
        await anext(stream)
        assert in_flight(deployment) == 1
        await stream.close()
        async with asyncio.timeout(30):
            while in_flight(deployment):
                await asyncio.sleep(0.01)


def in_flight(deployment: Deployment) -> int:
    """Return the number of requests admitted at the first worker."""
    server = deployment.processes[0].runtime._server
    assert server is not None
    return server.in_flight_count


async def test_a_deadline_is_a_gateway_timeout(deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=1)
    url = await deployment.frontend(request_timeout_s=0.3)
    await until_healthy(url)
    async with client_of(url) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(
                model="demo", messages=MESSAGES, max_tokens=20_000, extra_body={"ignore_eos": True}
            )
        assert caught.value.status_code == 504
        assert caught.value.code == "deadline_exceeded"


async def test_a_full_engine_is_overloaded(deployment: Deployment) -> None:
    await deployment.worker(speedup_ratio=1, max_num_seqs=1, max_num_waiting=1)
    url = await deployment.frontend()
    await until_healthy(url)
    long: dict[str, Any] = {"max_tokens": 20_000, "extra_body": {"ignore_eos": True}}
    async with client_of(url) as client:
        streams = [
            asyncio.create_task(
                client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **long)
            )
            for _ in range(2)
        ]
        async with asyncio.timeout(30):
            while in_flight(deployment) < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="demo", messages=MESSAGES, **long)
        assert caught.value.status_code == 503
        assert caught.value.code == "overloaded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def test_workers_come_and_go_while_requests_flow(deployment: Deployment) -> None:
    await deployment.worker()
    url = await deployment.frontend()
    await until_healthy(url)
    async with client_of(url) as client:
        stop = asyncio.Event()
        answered = 0

        async def flow() -> None:
            nonlocal answered
            while not stop.is_set():
                answer = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=8)
                assert answer.choices[0].message.content
                answered += 1

        flows = [asyncio.create_task(flow()) for _ in range(4)]
        for _ in range(2):
            await deployment.worker()
            await until_healthy(url, 2)
            await workers(deployment)[0].end()
            await until_healthy(url, 1)
        stop.set()
        await asyncio.gather(*flows)
    assert answered > 10


def workers(deployment: Deployment) -> list[Process]:
    """Return the running workers, oldest first."""
    return [p for p in deployment.processes if p.runtime._server is not None and not p.serving.done()]


async def test_files_that_vanish_come_back_from_their_workers(
    deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are gone, as by an eviction, and the registry is not.

    A frontend without a cache then starts.
    """
    monkeypatch.setattr("dynamo_redis.models.upload.CHECK_S", 0.2)
    await deployment.worker()
    with Redis.from_url(dynamo_redis_url) as redis:
        keys = list(redis.scan_iter(f"{{{dynamo_redis_prefix}/object*"))
        assert redis.delete(*keys) == len(keys) > 8
    url = await deployment.frontend()
    await until_healthy(url)
    async with client_of(url) as client, asyncio.timeout(30):
        while not [model async for model in client.models.list()]:
            await asyncio.sleep(0.02)
        answer = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=3)
    assert answer.choices[0].message.content


async def test_two_models_at_one_endpoint_do_not_mix(deployment: Deployment) -> None:
    first = await deployment.worker("first")
    second = await deployment.worker("second")
    url = await deployment.frontend()
    await until_healthy(url, 2)
    async with client_of(url) as client:
        for name in ("first", "second") * 5:
            await client.completions.create(model=name, prompt="x", max_tokens=2)
    assert (first.asked_for, second.asked_for) == (["first"] * 5, ["second"] * 5)


async def test_a_port_in_use_fails_before_anything_is_registered(deployment: Deployment) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="in use"):
            await deployment.frontend(http_port=taken.getsockname()[1])
    deployment.processes[-1].serving = asyncio.create_task(asyncio.sleep(0))
