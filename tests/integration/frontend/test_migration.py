"""Answers whose worker is lost: they go on at another worker, token for token."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InstanceRemoved,
    InvalidRequest,
    Overloaded,
    PlaneError,
)
from dynamo_redis.models.directory import ModelDirectory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from tests.frontend_deployment import Deployment, NotingEngine, until_healthy

PROMPT = {"model": "demo", "prompt": "Tell me a long story.", "max_tokens": 60, "ignore_eos": True}
WITHIN_S = 60.0


class LosingEngine(NotingEngine):
    """A mock engine that loses answers: each after a number of items, as `losses` says."""

    def __init__(self, settings: MockEngineSettings, model: ModelDirectory) -> None:
        super().__init__(settings, model)
        self.losses: list[int] = []
        self.error: type[PlaneError] = ConnectionLost

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        left = self.losses.pop(0) if self.losses else None
        async for item in super().generate(request, context):
            if left == 0:
                raise self.error("the engine is gone")
            yield item
            if left is not None:
                left -= 1


class Losses:
    """The engines of a deployment, which lose answers together."""

    def __init__(self, *engines: LosingEngine) -> None:
        self.engines = engines

    def set(self, *counts: int, error: type[PlaneError] = ConnectionLost) -> None:
        """Lose the next answers of the deployment after these numbers of items."""
        shared = list(counts)
        for engine in self.engines:
            engine.losses, engine.error = shared, error
            engine.requests.clear()

    @property
    def requests(self) -> list[GenerateRequest]:
        return [request for engine in self.engines for request in engine.requests]


async def losing_engines(
    deployment: Deployment, count: int = 2, *, kind: type[LosingEngine] = LosingEngine, **options: Any
) -> Losses:
    engines = []
    for _ in range(count):
        engine = await deployment.worker(kind=kind, **options)
        assert isinstance(engine, LosingEngine)
        engines.append(engine)
    return Losses(*engines)


async def complete(url: str, **options: Any) -> tuple[int, dict[str, Any]]:
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        response = await http.post(f"{url}/v1/completions", json={**PROMPT, **options})
        return response.status_code, response.json()


async def stream(url: str, **options: Any) -> list[dict[str, Any]]:
    body = {**PROMPT, "stream": True, "stream_options": {"include_usage": True}, **options}
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        response = await http.post(f"{url}/v1/completions", json=body)
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in events if event.get("choices"))


@pytest.mark.parametrize("mode", ["round_robin", "kv"])
@pytest.mark.parametrize("losses", [(0,), (1,), (7,), (30, 20), (59,), (0, 4), (3, 0, 5), (5, 0, 0)])
async def test_an_answer_goes_on_token_for_token(
    deployment: Deployment, losses: tuple[int, ...], mode: str
) -> None:
    engines = await losing_engines(deployment, 4)
    url = await deployment.frontend(migration_limit=3, router_mode=mode)
    await until_healthy(url, 4)
    status, unbroken = await complete(url)
    assert (status, unbroken["usage"]["completion_tokens"]) == (200, 60)

    engines.set(*losses)
    events = await stream(url)
    assert len(engines.requests) == len(losses) + 1
    assert text_of(events) == unbroken["choices"][0]["text"]
    assert events[-1]["usage"]["completion_tokens"] == 60
    assert events[-1]["usage"]["prompt_tokens"] == unbroken["usage"]["prompt_tokens"]
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]][-1] == "length"

    engines.set(*losses)
    status, whole = await complete(url)
    assert (status, whole["choices"], whole["usage"]["total_tokens"]) == (
        200,
        unbroken["choices"],
        unbroken["usage"]["total_tokens"],
    )


async def test_the_next_worker_gets_the_rest_of_the_budget(deployment: Deployment) -> None:
    engines = await losing_engines(deployment)
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 2)
    engines.set(20)
    assert text_of(await stream(url, min_tokens=30))
    first, second = sorted(engines.requests, key=lambda request: len(request["token_ids"]))
    assert len(second["token_ids"]) == len(first["token_ids"]) + 20
    assert second["answered_count"] == 20
    assert (second["stop_conditions"]["max_tokens"], second["stop_conditions"]["min_tokens"]) == (40, 10)
    assert "answered_count" not in first


class CountingEngine(LosingEngine):
    """Sends its own counts with the last item, as engines do that cannot send each token by itself."""

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        count = 0
        async for item in super().generate(request, context):
            count += len(item["token_ids"])
            if item.get("finish_reason"):
                prompt_count = len(request["token_ids"])
                item["completion_usage"] = {"prompt_tokens": prompt_count, "completion_tokens": count}
            yield item


async def test_counts_of_an_engine_cover_the_whole_answer(deployment: Deployment) -> None:
    engines = await losing_engines(deployment, kind=CountingEngine)
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 2)
    _, unbroken = await complete(url)
    engines.set(20)
    usage = (await stream(url))[-1]["usage"]
    assert len(engines.requests) == 2
    assert usage["completion_tokens"] == 60
    assert usage["prompt_tokens"] == unbroken["usage"]["prompt_tokens"]


async def test_the_lost_worker_is_not_asked_again(deployment: Deployment) -> None:
    engines = await losing_engines(deployment, 2)
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 2)
    for _ in range(10):
        engines.set(5)
        assert text_of(await stream(url))
        assert sorted(len(engine.requests) for engine in engines.engines) == [1, 1]


@pytest.mark.parametrize("error", [ConnectionLost, Draining, InstanceRemoved, EngineFailed])
async def test_each_way_of_losing_a_worker_is_survived(
    deployment: Deployment, error: type[PlaneError]
) -> None:
    engines = await losing_engines(deployment)
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 2)
    engines.set(5, error=error)
    events = await stream(url)
    assert events[-1]["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    ("settings", "losses", "options"),
    [
        ({"migration_limit": 0}, (5,), {}),
        ({}, (5,), {}),
        ({"migration_limit": 1}, (5, 5), {}),
        ({"migration_limit": 5, "migration_max_seq_len": 10}, (9,), {}),
    ],
)
async def test_an_answer_that_may_not_go_on_ends_with_an_error(
    deployment: Deployment, settings: dict[str, int], losses: tuple[int, ...], options: dict[str, Any]
) -> None:
    engines = await losing_engines(deployment, 3)
    url = await deployment.frontend(**settings)
    await until_healthy(url, 3)
    engines.set(*losses)
    *events, last = await stream(url, **options)
    assert last["error"]["code"] == ConnectionLost.code
    assert "incomplete" in last["error"]["message"]
    assert len(events) >= 1


@pytest.mark.parametrize(
    "settings", [{"migration_limit": 1}, {"migration_limit": 3, "migration_max_seq_len": 30}]
)
async def test_whole_answer_beyond_the_limit_begins_again(
    deployment: Deployment, settings: dict[str, int]
) -> None:
    """It begins with its first token, not with the one at which it moved."""
    engines = await losing_engines(deployment, 3)
    url = await deployment.frontend(**settings)
    await until_healthy(url, 3)
    _, unbroken = await complete(url)
    engines.set(5, 50)
    status, whole = await complete(url)
    assert (status, whole["choices"]) == (200, unbroken["choices"])
    assert whole["usage"]["total_tokens"] == unbroken["usage"]["total_tokens"]
    assert sorted(request.get("answered_count", 0) for request in engines.requests) == [0, 0, 5]


async def test_the_models_limit_counts_unless_the_frontend_has_one(deployment: Deployment) -> None:
    engines = await losing_engines(deployment, 2, migration_limit=1)
    by_model = await deployment.frontend()
    own = await deployment.frontend(migration_limit=0)
    for url in (by_model, own):
        await until_healthy(url, 2)
    engines.set(5)
    assert (await stream(by_model))[-1]["usage"]["completion_tokens"] == 60
    engines.set(5)
    assert (await stream(own))[-1]["error"]["code"] == ConnectionLost.code


async def test_an_error_of_the_request_itself_is_not_repeated(deployment: Deployment) -> None:
    engines = await losing_engines(deployment)
    url = await deployment.frontend(migration_limit=5)
    await until_healthy(url, 2)
    engines.set(5, error=InvalidRequest)
    assert (await stream(url))[-1]["error"]["code"] == InvalidRequest.code
    assert len(engines.requests) == 1


async def test_the_only_worker_may_go_on_itself(deployment: Deployment) -> None:
    engines = await losing_engines(deployment, 1)
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 1)
    engines.set(5)
    assert (await stream(url))[-1]["usage"]["completion_tokens"] == 60


async def test_stop_strings_across_a_migration_are_found(deployment: Deployment) -> None:
    engines = await losing_engines(deployment)
    url = await deployment.frontend(migration_limit=1)
    await until_healthy(url, 2)
    _, unbroken = await complete(url)
    text = unbroken["choices"][0]["text"]
    stop = text[60:72]
    engines.set(*[text[:66].count(" ")])  # some place around the stop string
    events = await stream(url, stop=[stop])
    assert text_of(events) == text[: text.index(stop)]


class FullEngine(LosingEngine):
    """Refuses the rest of an answer a number of times."""

    refusal_count = 0

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        if request.get("answered_count") and self.refusal_count:
            self.refusal_count -= 1
            raise Overloaded("no room")
        async for item in super().generate(request, context):
            yield item


@pytest.mark.parametrize("mode", ["round_robin", "kv"])
async def test_rest_of_an_answer_waits_for_room(deployment: Deployment, mode: str) -> None:
    engines = await losing_engines(deployment, 3, kind=FullEngine)
    url = await deployment.frontend(migration_limit=1, router_mode=mode)
    await until_healthy(url, 3)
    _, unbroken = await complete(url)
    for is_stream in (True, False):
        engines.set(5)
        for engine in engines.engines:
            assert isinstance(engine, FullEngine)
            engine.refusal_count = 4
        answered = text_of(await stream(url)) if is_stream else (await complete(url))[1]["choices"][0]["text"]
        assert answered == unbroken["choices"][0]["text"]


async def test_wait_for_room_ends_with_the_deadline(deployment: Deployment) -> None:
    engines = await losing_engines(deployment, 2, kind=FullEngine)
    url = await deployment.frontend(migration_limit=1, request_timeout_s=1.5)
    await until_healthy(url, 2)
    engines.set(5)
    for engine in engines.engines:
        assert isinstance(engine, FullEngine)
        engine.refusal_count = 1_000_000
    *events, last = await stream(url)
    assert text_of(events)
    assert last["error"]["code"] == DeadlineExceeded.code


# --------------------------------------------------------------------------- processes that are killed


async def test_killed_workers_cost_no_answer(
    deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """Of four worker processes two are killed one after another under load."""
    workers = [start_worker(dynamo_redis_url, dynamo_redis_prefix) for _ in range(4)]
    try:
        url = await deployment.frontend(migration_limit=3)
        await until_healthy(url, 4)
        _, unbroken = await complete(url)
        killed = asyncio.Event()

        async def ask_until_killed() -> int:
            count = 0
            while not killed.is_set():
                events = await stream(url)
                assert text_of(events) == unbroken["choices"][0]["text"]
                count += 1
            return count

        asking = [asyncio.create_task(ask_until_killed()) for _ in range(16)]
        for worker in workers[:2]:
            await asyncio.sleep(1.0)
            worker.kill()
        await asyncio.sleep(1.0)
        killed.set()
        assert min(await asyncio.gather(*asking)) >= 1
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def start_worker(url: str, prefix: str, speedup_ratio: str = "1") -> subprocess.Popen[bytes]:
    """Start a worker process that answers in about a second."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dynamo_redis", "worker", "mock"],
        env={
            **os.environ,
            "DYN_REDIS_URL": url,
            "DYN_REDIS_PREFIX": prefix,
            "DYN_MOCK_SPEEDUP_RATIO": speedup_ratio,
            "DYN_LOG": "error",
        },
        stdout=subprocess.DEVNULL,
    )


async def until_begun(response: httpx.Response) -> AsyncIterator[str]:
    """Return the lines of a stream, once its first has come."""
    lines = response.aiter_lines()
    await anext(lines)
    return lines


async def test_answer_waits_for_a_new_worker(
    deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """The only worker is killed, and another one starts a moment later."""
    workers = [start_worker(dynamo_redis_url, dynamo_redis_prefix)]
    try:
        url = await deployment.frontend(migration_limit=1)
        await until_healthy(url, 1)
        _, unbroken = await complete(url)
        body = {**PROMPT, "stream": True}
        async with (
            httpx.AsyncClient(timeout=WITHIN_S) as http,
            http.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            lines = await until_begun(response)
            workers[0].kill()
            await deployment.worker()
            rest = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
        assert not any("error" in event for event in rest)
        text = unbroken["choices"][0]["text"]
        assert text.endswith(text_of(rest))
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


async def test_wait_for_a_worker_ends_with_the_deadline(
    deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    worker = start_worker(dynamo_redis_url, dynamo_redis_prefix, speedup_ratio="0.1")
    try:
        url = await deployment.frontend(migration_limit=1, request_timeout_s=3)
        await until_healthy(url, 1)
        body = {**PROMPT, "stream": True}
        async with (
            httpx.AsyncClient(timeout=WITHIN_S) as http,
            http.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            lines = await until_begun(response)
            worker.kill()
            *_, last = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
        assert last["error"]["code"] == DeadlineExceeded.code
    finally:
        worker.kill()
        worker.wait()
