"""Embeddings of an OpenAI-compatible server: over real HTTP, with a small engine in the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import openai
import pytest

from dynamo_redis.config import OpenAIEngineSettings
from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.openai import http
from dynamo_redis.engines.openai.embedding import OpenAIEmbeddingEngine, read_embeddings
from dynamo_redis.errors import (
    ConnectionLost,
    ContextLengthExceeded,
    Draining,
    InvalidRequest,
    Overloaded,
    ProtocolViolation,
)
from dynamo_redis.models.directory import read_model_directory
from dynamo_redis.models.vectors import pack
from dynamo_redis.planes.context import Context
from tests.frontend_deployment import Deployment, until_healthy
from tests.integration.engines.openai_engine import MODEL_NAME, TestEngine, running_engine
from tests.integration.frontend.conftest import deployment

__all__ = ["deployment"]


def settings_of(server: TestEngine, **settings: Any) -> OpenAIEngineSettings:
    defaults: dict[str, Any] = {"engine_url": server.url, "engine_poll_interval_s": 0.02}
    return OpenAIEngineSettings(**defaults | settings)


@asynccontextmanager
async def engine_at(server: TestEngine, **settings: Any) -> AsyncIterator[OpenAIEmbeddingEngine]:
    engine = OpenAIEmbeddingEngine(settings_of(server, **settings), read_model_directory(DEMO_MODEL_PATH))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.aclose()


async def answer(
    engine: OpenAIEmbeddingEngine, inputs: Any, context: Context | None = None, **more: Any
) -> list[Any]:
    request: Any = {"model": "vectors", "token_ids": inputs, "encoding_format": "float", **more}
    async with aclosing(engine.generate(request, context or Context())) as items:
        return [cast("Any", item) async for item in items]


async def test_ids_and_options_are_sent_unchanged() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        [item] = await answer(engine, [[5, 6, 7], [8]])
        # The server's entries come in any order.
        assert item == {
            "embeddings": [[3.0, 0.0, 1.0], [1.0, 0.0, 1.0]],
            "prompt_tokens": 7,
            "total_tokens": 7,
        }
        assert server.requests == [
            {"model": MODEL_NAME, "input": [[5, 6, 7], [8]], "encoding_format": "float"}
        ]
        [item] = await answer(engine, [[5]], encoding_format="base64", dimensions=2)
        assert item["embeddings"] == [pack([1.0, 0.0])]
        assert server.requests[-1]["dimensions"] == 2


async def test_many_inputs_are_sent_in_batches() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        items = await answer(engine, [[5] * (1 + number % 3) for number in range(150)])
        vectors = [vector for item in items for vector in item["embeddings"]]
        assert [vector[0] for vector in vectors] == [1.0 + number % 3 for number in range(150)]
        assert [len(request["input"]) for request in server.requests] == [64, 64, 22]


async def test_server_without_ids_gets_text() -> None:
    async with running_engine(owner="some", takes_ids=False) as server, engine_at(server) as engine:
        ids = server.tokenizer.encode("Hello you", add_special_tokens=False).ids
        [item] = await answer(engine, [ids])
        assert item["embeddings"][0][0] == len("Hello you")
        assert server.requests[-1]["input"] == ["Hello you"]
        await answer(engine, [ids])
        assert len(server.requests) == 3  # ids are not tried again


async def test_renamed_model_is_asked_again() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        server.name = "another"
        [item] = await answer(engine, [[5]])
        assert item["embeddings"]
        assert server.requests[-1]["model"] == "another"


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        ((400, "dimensions are not supported"), InvalidRequest),
        ((400, "maximum context length is 8 tokens"), ContextLengthExceeded),
        ((503, "busy"), Overloaded),
    ],
)
async def test_refusals_of_the_server_are_told(refusal: tuple[int, str], error: type[Exception]) -> None:
    async with running_engine() as server, engine_at(server) as engine:
        server.refuse_with = refusal
        with pytest.raises(error, match=refusal[1]):
            await answer(engine, [[5]])
        assert len(server.requests) == 1


async def test_broken_connection_is_an_error() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        server.break_off_after = 0
        with pytest.raises((ConnectionLost, Draining)):
            await answer(engine, [[5]])


async def test_answer_over_the_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_ANSWER_BYTES", 100)
    async with running_engine() as server, engine_at(server) as engine:
        with pytest.raises(ProtocolViolation, match="more than 100 bytes"):
            await answer(engine, [[5]])


async def test_stopped_request_ends_without_an_item() -> None:
    async with running_engine() as server, engine_at(server) as engine:
        context = Context()
        context.kill()
        assert await answer(engine, [[5]], context) == []


@pytest.mark.parametrize(
    "inputs", [None, [], [[]], [5, 6], [["a"]], [[True]], "text", [[5], "text"]], ids=str
)
async def test_wrong_inputs_are_refused(inputs: Any) -> None:
    async with running_engine() as server, engine_at(server) as engine:
        with pytest.raises(InvalidRequest, match="token_ids"):
            await answer(engine, inputs)
        with pytest.raises(InvalidRequest, match="dimensions"):
            await answer(engine, [[5]], dimensions="8")
        assert server.requests == []


@pytest.mark.parametrize(
    "content",
    [b"", b"no JSON", b"[]", b"{}", b'{"data": 5}', b'{"data": [{"index": 0}]}', b'{"data": []}'],
)
def test_answer_without_embeddings_is_an_error(content: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        read_embeddings(content, 1)


async def test_embeddings_come_through_the_frontend(deployment: Deployment) -> None:
    model = read_model_directory(DEMO_MODEL_PATH)
    async with running_engine() as server:
        engine = OpenAIEmbeddingEngine(settings_of(server), model)
        await deployment.serve(engine, model, "vectors", model_type="embedding")
        url = await deployment.frontend()
        await until_healthy(url, 1)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            found = await client.embeddings.create(model="vectors", input=[[5, 6], [7]])
            assert [each.embedding for each in found.data] == [[2.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
            assert found.usage.prompt_tokens == 7
            server.refuse_with = (400, "dimensions are not supported")
            with pytest.raises(openai.BadRequestError, match="dimensions are not supported"):
                await asyncio.wait_for(
                    client.embeddings.create(model="vectors", input="a", dimensions=2), timeout=30
                )
