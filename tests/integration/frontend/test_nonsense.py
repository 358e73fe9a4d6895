"""Engines that answer nonsense: the client gets a clear error, no stream is stuck, and no counter is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_redis.config import MockEngineSettings
from dynamo_redis.models.directory import ModelDirectory
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context
from tests.frontend_deployment import Deployment, NotingEngine, until_healthy

BODY = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 8}
GOOD = {"token_ids": [40]}
END = {"token_ids": [41], "finish_reason": "stop"}
WITHIN_S = 30.0

Items = Callable[[], AsyncIterator[Any]]


class NonsenseEngine(NotingEngine):
    """Answers with the items that a test gives it, and without them as the mock engine does."""

    def __init__(self, settings: MockEngineSettings, model: ModelDirectory) -> None:
        super().__init__(settings, model)
        self.items: Items | None = None

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        async for item in super().generate(request, context) if self.items is None else self.items():
            yield item


def given(*items: Any, then: Exception | None = None, endless: Any = None) -> Items:
    async def produce() -> AsyncIterator[Any]:
        for item in items:
            yield item
        if then is not None:
            raise then
        while endless is not None:
            yield endless

    return produce


WRONG_ITEMS: dict[str, Any] = {
    "text": "hello",
    "number": 5,
    "list": [1, 2],
    "bytes": b"\x00\xff",
    "ids are a number": {"token_ids": 5},
    "ids are a text": {"token_ids": "ab"},
    "ids are bytes": {"token_ids": b"ab"},
    "ids are a map": {"token_ids": {"a": 1}},
    "an id is a text": {"token_ids": ["a"]},
    "an id is null": {"token_ids": [None]},
    "an id is a fraction": {"token_ids": [1.5]},
    "an id is a list": {"token_ids": [[1]]},
    "an id is negative": {"token_ids": [-1]},
    "an id is past the vocabulary": {"token_ids": [10**9]},
    "an id is past 32 bits": {"token_ids": [1 << 40]},
    "an id is past 64 bits": {"token_ids": [(1 << 64) - 1]},
    "more ids than any context": {"token_ids": [40] * 500_000},
    "reason is a number": {"token_ids": [40], "finish_reason": 5},
    "reason is a list": {"token_ids": [40], "finish_reason": ["stop"]},
    "reason is an error": {"token_ids": [40], "finish_reason": "error: out of memory"},
    "no value of msgpack": {"token_ids": [40], "finish_reason": object()},
}


async def ask(url: str, *, is_stream: bool) -> tuple[int, str, dict[str, Any]]:
    """Return the status, the text, and the error."""
    async with httpx.AsyncClient(timeout=WITHIN_S) as http:
        answer = await http.post(f"{url}/v1/completions", json={**BODY, "stream": is_stream})
    if not is_stream or answer.status_code != 200:
        body = answer.json()
        return (
            answer.status_code,
            "" if "error" in body else body["choices"][0]["text"],
            body.get("error", {}),
        )
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    text = "".join(event["choices"][0]["text"] for event in events if event.get("choices"))
    error: dict[str, Any] = next((event["error"] for event in events if "error" in event), {})
    assert bool(error) != ("[DONE]" in lines)
    return answer.status_code, text, error


async def serve(deployment: Deployment, **settings: Any) -> tuple[str, NonsenseEngine]:
    engine = await deployment.worker(kind=NonsenseEngine)
    assert isinstance(engine, NonsenseEngine)
    url = await deployment.frontend(**settings)
    await until_healthy(url, 1)
    return url, engine


async def assert_at_rest(url: str, engine: NonsenseEngine) -> None:
    """No counter is left over, and the next request is served."""
    engine.items = None
    status, text, _ = await ask(url, is_stream=False)
    assert status == 200
    assert text
    async with httpx.AsyncClient(timeout=WITHIN_S) as http, asyncio.timeout(WITHIN_S):
        while True:
            found = text_string_to_metric_families((await http.get(f"{url}/metrics")).text)
            gauges = {s.name: s.value for family in found for s in family.samples}
            if not gauges["dynamo_frontend_inflight_requests"] + gauges["dynamo_frontend_queued_requests"]:
                break
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("migration_limit", [0, 2])
async def test_nonsense_is_a_clear_error(deployment: Deployment, migration_limit: int) -> None:
    url, engine = await serve(deployment, migration_limit=migration_limit)
    for name, item in WRONG_ITEMS.items():
        for first in ((), (GOOD,)):
            for is_stream in (False, True):
                engine.items = given(*first, item)
                status, _, error = await ask(url, is_stream=is_stream)
                assert status == (200 if is_stream and first else 502), name
                assert error["code"] in ("protocol_violation", "handler_failed"), name
                assert len(error["message"]) < 500
    await assert_at_rest(url, engine)


async def test_handler_that_raises_is_no_500(deployment: Deployment) -> None:
    url, engine = await serve(deployment)
    for first in ((), (GOOD,)):
        for is_stream in (False, True):
            engine.items = given(*first, then=ZeroDivisionError("boom"))
            status, _, error = await ask(url, is_stream=is_stream)
            assert status == (200 if is_stream and first else 502)
            assert error["code"] == "handler_failed"
    await assert_at_rest(url, engine)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_answer_without_an_end_is_an_error(deployment: Deployment, is_stream: bool) -> None:
    url, engine = await serve(deployment)
    empty: list[tuple[Any, ...]] = [(), ({},), ({"token_ids": []},), ({"other": 1},)]
    for items in empty:
        engine.items = given(*items)
        status, _, error = await ask(url, is_stream=is_stream)
        assert error["code"] == "engine_failed", items
        assert status == (200 if is_stream and items else 502)
    engine.items = given(GOOD)
    status, _, error = await ask(url, is_stream=is_stream)
    assert error["code"] == "connection_lost"
    engine.items = given(endless=GOOD)
    status, _, error = await ask(url, is_stream=is_stream)
    assert error["code"] == "protocol_violation"
    await assert_at_rest(url, engine)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_end_may_come_without_tokens(deployment: Deployment, is_stream: bool) -> None:
    url, engine = await serve(deployment)
    engine.items = given(GOOD, {"finish_reason": "stop"})
    status, text, error = await ask(url, is_stream=is_stream)
    assert (status, bool(text), error) == (200, True, {})


@pytest.mark.parametrize("is_stream", [False, True])
async def test_items_after_the_end_are_left_out(deployment: Deployment, is_stream: bool) -> None:
    url, engine = await serve(deployment)
    engine.items = given(GOOD, END)
    _, wanted, _ = await ask(url, is_stream=is_stream)
    assert wanted
    for items in (
        given(GOOD, END, GOOD, END),
        given(GOOD, END, "nonsense"),
        given(GOOD, END, then=ZeroDivisionError("boom")),
        given(GOOD, END, endless=GOOD),
    ):
        engine.items = items
        assert await ask(url, is_stream=is_stream) == (200, wanted, {})
    await assert_at_rest(url, engine)


async def test_counts_that_are_nonsense_are_left_out(deployment: Deployment) -> None:
    url, engine = await serve(deployment)
    wrongs: list[Any] = ["9", -1, 1.5, None, True, 1 << 60, [1], {}]
    for wrong in wrongs:
        usage = {"prompt_tokens": wrong, "completion_tokens": wrong}
        engine.items = given({**GOOD, "cached_tokens": wrong}, {**END, "completion_usage": usage})
        async with httpx.AsyncClient(timeout=WITHIN_S) as http:
            answer = await http.post(f"{url}/v1/completions", json=BODY)
        assert answer.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    await assert_at_rest(url, engine)
