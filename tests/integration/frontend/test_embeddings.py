"""`/v1/embeddings`: the official client, a scripted worker, and real workers on a real Redis."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from dynamo_redis import errors
from dynamo_redis.frontend.forms.embeddings import EmbeddingsForm
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.card import RuntimeConfig
from dynamo_redis.planes.context import Context
from tests.frontend_deployment import Deployment, until_healthy
from tests.integration.frontend.http.test_openapi import body_validator, document_of, validator
from tests.integration.frontend.test_agent_apis import samples

PATH = "/v1/embeddings"
BODY: dict[str, Any] = {"model": "vectors", "input": "Hello"}
WITHIN_S = 30
OPTIONS = ("--model-type", "embedding", "--model-name", "vectors", "--prefill-token", "200ms")


async def embed(request: Any, context: Context) -> AsyncGenerator[Any]:
    """Answer each input with its number of tokens and two other numbers, two inputs an item."""
    vectors = [[float(len(token_ids)), 0.5, -1.0] for token_ids in request["token_ids"]]
    for start in range(0, len(vectors), 2):
        count = sum(map(len, request["token_ids"][start : start + 2]))
        yield {"embeddings": vectors[start : start + 2], "prompt_tokens": count, "total_tokens": count}


async def embed_at_length(request: Any, context: Context) -> AsyncGenerator[Any]:
    """Answer each input with a vector of 8,192 numbers, eight inputs an item."""
    vector = [0.5] * 8192
    left = len(request["token_ids"])
    while left > 0:
        yield {"embeddings": [vector] * min(left, 8), "prompt_tokens": min(left, 8)}
        left -= 8


@pytest.fixture
async def embedder(open_frontend: Any) -> Any:
    """Yield a frontend that serves the embedding model `vectors`, and the chat model `demo`."""
    frontend = await open_frontend()
    await frontend.runtime.publish("vectors", model_type="embedding", instance_id=2)
    await frontend.until_served("vectors")
    frontend.worker.ids = [1, 2]
    frontend.worker.script = embed
    return frontend


async def test_inputs_are_taken_in_every_form(embedder: Any, demo_tokenizer: Tokenizer) -> None:
    one, other = demo_tokenizer.encode("Once upon"), demo_tokenizer.encode("a time")
    inputs: list[Any] = ["Once upon", ["Once upon", "a time"], one, [one, other]]
    for given, wanted in zip(inputs, ([one], [one, other], [one], [one, other]), strict=True):
        embedder.worker.requests.clear()
        for encoding_format in ("float", "base64"):
            answer = await embedder.client.embeddings.create(
                model="vectors", input=given, encoding_format=encoding_format
            )
            assert answer.object == "list"
            assert answer.model == "vectors"
            assert [each.index for each in answer.data] == list(range(len(wanted)))
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, wanted))
        # One request to a worker, whatever the number of inputs.
        assert [request["token_ids"] for request in embedder.worker.requests] == [wanted, wanted]
    # Without a format the client asks for base64, and decodes it.
    answer = await embedder.client.embeddings.create(model="vectors", input=["Once upon"])
    assert list(answer.data[0].embedding) == [float(len(one)), 0.5, -1.0]
    assert embedder.worker.requests[-1]["encoding_format"] == "base64"


async def test_answer_is_strictly_openais(embedder: Any) -> None:
    response = await embedder.http.post(PATH, json={**BODY, "input": ["a", "b", "c"], "user": "u"})
    assert response.status_code == 200, response.text
    answer = CreateEmbeddingResponse.model_validate(response.json(), strict=True)
    assert not any(part.model_extra for part in (answer, answer.usage, *answer.data))
    assert list(response.json()) == ["object", "data", "model", "usage"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({"encoding_format": "base64", "dimensions": 3}, True),
        ({"input": ["a", "b"], "user": "me", "stream": False}, True),
        ({"input": [[1, 2], [3]]}, True),
        ({"input": []}, False),
        ({"input": ["a", ""]}, False),
        ({"dimensions": 0}, False),
        ({"odd": 1}, False),
    ],
)
async def test_embeddings_are_as_described(embedder: Any, change: dict[str, Any], is_taken: bool) -> None:
    document = await document_of(embedder.http)
    response = await embedder.http.post(PATH, json=BODY | change)
    assert (response.status_code == 200) is is_taken
    assert body_validator(document, PATH).is_valid(BODY | change) is is_taken
    described = document["paths"][PATH]["post"]["responses"][str(response.status_code)]["content"]
    assert list(described) == ["application/json"]
    validator(document, described["application/json"]["schema"]).validate(response.json())


async def test_large_bodies_are_embedded(embedder: Any) -> None:
    """Their texts come back from the process that parses them."""
    response = await embedder.http.post(PATH, json={**BODY, "input": ["word " * 100] * 700})
    assert response.status_code == 200, response.text
    assert len(response.json()["data"]) == 700
    assert len(embedder.worker.requests) == 1


async def test_dimensions_reach_the_worker(embedder: Any) -> None:
    response = await embedder.http.post(PATH, json={**BODY, "dimensions": 3})
    assert response.status_code == 200
    assert embedder.worker.requests[-1]["dimensions"] == 3
    response = await embedder.http.post(PATH, json={**BODY, "dimensions": 2})
    assert response.status_code == 400
    assert "dimensions: the engine" in response.json()["error"]["message"]


async def test_dimensions_are_refused_if_the_card_says_so(embedder: Any) -> None:
    fixed = RuntimeConfig(matryoshka=False)
    await embedder.runtime.publish("fixed", model_type="embedding", instance_id=3, runtime_config=fixed)
    await embedder.until_served("fixed")
    response = await embedder.http.post(PATH, json={**BODY, "model": "fixed", "dimensions": 3})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "dimensions")
    assert error["code"] == "unsupported_parameter"
    assert not embedder.worker.requests
    assert (await embedder.http.post(PATH, json={**BODY, "model": "fixed"})).status_code == 200


async def test_workers_that_take_text_get_it(embedder: Any) -> None:
    await embedder.runtime.publish("texts", model_type="embedding", model_input="text", instance_id=4)
    await embedder.until_served("texts")
    for given in (["Hi", "you"], [[5, 6]], ["word " * 30_000]):
        response = await embedder.http.post(PATH, json={"model": "texts", "input": given})
        assert response.status_code == 200, response.text
        assert embedder.worker.requests[-1]["input"] == given
    await embedder.http.post(PATH, json=BODY)
    assert "input" not in embedder.worker.requests[-1]


@pytest.mark.parametrize(
    ("path", "body", "hint"),
    [
        (PATH, {"model": "demo", "input": "Hi"}, "makes no embeddings: use /v1/chat/completions"),
        (
            "/v1/chat/completions",
            {"model": "vectors", "messages": [{"role": "user", "content": "Hi"}]},
            "makes embeddings only: use /v1/embeddings",
        ),
        ("/v1/completions", {"model": "vectors", "prompt": "Hi"}, "makes embeddings only"),
        ("/v1/responses", {"model": "vectors", "input": "Hi"}, "makes embeddings only"),
        (
            "/v1/messages",
            {"model": "vectors", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]},
            "makes embeddings only",
        ),
    ],
)
async def test_model_of_another_type_is_told(
    embedder: Any, path: str, body: dict[str, Any], hint: str
) -> None:
    response = await embedder.http.post(path, json=body)
    assert response.status_code == 400
    assert hint in response.json()["error"]["message"]
    assert not embedder.worker.requests


async def test_versions_of_both_types_share_a_name(embedder: Any) -> None:
    await embedder.runtime.publish("demo", model_type="embedding", instance_id=6)
    embedder.worker.ids.append(6)
    demo = {**BODY, "model": "demo"}
    async with asyncio.timeout(WITHIN_S):
        while (await embedder.http.post(PATH, json=demo)).status_code != 200:
            await asyncio.sleep(0.01)
    for _ in range(10):
        assert (await embedder.http.post(PATH, json=demo)).status_code == 200


async def test_tokens_of_an_embedding_model_are_told(embedder: Any) -> None:
    response = await embedder.http.post("/tokenize", json={"model": "vectors", "prompt": "Hello"})
    assert response.json()["tokens"] == embedder.worker.tokenizer.encode("Hello")


async def test_input_over_the_context_is_refused(embedder: Any, demo_tokenizer: Tokenizer) -> None:
    await embedder.runtime.publish("short", model_type="embedding", instance_id=5, context_length=4)
    await embedder.until_served("short")
    for given in ([1, 2, 3, 4, 5], [[1], [1, 2, 3, 4, 5]], ["a", "word " * 2000]):
        response = await embedder.http.post(PATH, json={"model": "short", "input": given})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == "input"
    # All of the context may be input: nothing is generated.
    assert (await embedder.http.post(PATH, json={"model": "short", "input": [1, 2, 3, 4]})).status_code == 200
    beyond = demo_tokenizer.vocabulary_size
    response = await embedder.http.post(PATH, json={**BODY, "input": [beyond]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")


BAD: dict[str, bytes] = {
    "no JSON": b"hello",
    "a list": b"[1]",
    "no UTF-8": b'{"model": "vectors", "input": "\xff"}',
    "a lone surrogate": b'{"model": "vectors", "input": "\\ud800"}',
    "NaN": b'{"model": "vectors", "input": [NaN]}',
    "a huge number": b'{"model": "vectors", "input": [1' + b"0" * 400 + b"]}",
    "deep lists": b'{"model": "vectors", "input": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "too many inputs": json.dumps({"model": "vectors", "input": ["a"] * 2049}).encode(),
    "nothing": b"{}",
    "an unknown parameter": b'{"model": "vectors", "input": "a", "of_tomorrow": 1}',
    "a stream": b'{"model": "vectors", "input": "a", "stream": true}',
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_is_refused(embedder: Any, case: str) -> None:
    response = await embedder.http.post(PATH, content=BAD[case])
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not embedder.worker.requests


async def test_long_items_are_embedded(embedder: Any) -> None:
    async def at_once(request: Any, context: Context) -> AsyncGenerator[Any]:
        yield {"embeddings": [[float(number)] * 4096 for number in range(len(request["token_ids"]))]}

    embedder.worker.script = at_once
    answer = await embedder.client.embeddings.create(model="vectors", input=["a"] * 100)
    assert [each.embedding[0] for each in answer.data] == list(range(100))


async def test_answer_is_written_in_pieces(embedder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of input may have megabytes of vectors: no turn of the event loop makes all of them."""
    whole = EmbeddingsForm.whole
    longest: list[int] = []

    def noted(form: EmbeddingsForm, *given: Any) -> list[str]:
        pieces = whole(form, *given)
        longest.append(max(map(len, pieces)))
        return pieces

    monkeypatch.setattr(EmbeddingsForm, "whole", noted)
    embedder.worker.script = embed_at_length
    answer = await embedder.http.post(PATH, json=BODY | {"input": ["a"] * 200})
    assert len(answer.json()["data"]) == 200
    assert int(answer.headers["content-length"]) == len(answer.content) > 4 << 20
    assert longest[0] < 1 << 20


async def test_held_embeddings_have_a_limit(open_frontend: Any) -> None:
    frontend = await open_frontend(max_bodies_bytes="1MiB", max_body_bytes="1MiB")
    await frontend.runtime.publish("vectors", model_type="embedding", instance_id=2)
    await frontend.until_served("vectors")
    frontend.worker.ids = [1, 2]
    frontend.worker.script = embed_at_length
    for _ in range(2):
        answer = await frontend.http.post(PATH, json=BODY | {"input": ["a"] * 200})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    frontend.worker.script = embed
    answer = await frontend.http.post(PATH, json=BODY | {"input": ["a"] * 200})
    assert answer.status_code == 200, "what was held is given back"


async def test_unknown_model_is_not_found(embedder: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        await embedder.client.embeddings.create(model="nowhere", input="Hi")


async def test_requests_for_embeddings_are_counted(embedder: Any) -> None:
    await embedder.http.post(PATH, json={**BODY, "input": ["a", "b", "c"]})
    await embedder.http.post(PATH, json={})
    # Items of embeddings are no tokens.
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "output_sequence_tokens"):
        assert (await samples(embedder, f"{name}_count")).get("", 0.0) == 0
    assert (await samples(embedder, "requests_total"))["embeddings"] == 1
    assert (await samples(embedder, "requests_refused_total"))["embeddings"] == 1
    assert (await samples(embedder, "inflight_requests"))[""] == 0


async def test_answer_begins_anew_at_another_worker(embedder: Any) -> None:
    lost_count = 0

    async def breaks_off(request: Any, context: Context) -> AsyncGenerator[Any]:
        nonlocal lost_count
        async for item in embed(request, context):
            yield item
            if lost_count < 2:
                lost_count += 1
                raise errors.ConnectionLost("gone")

    embedder.worker.script = breaks_off
    answer = await embedder.client.embeddings.create(model="vectors", input=["a", "b", "c", "d"])
    assert [each.index for each in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 4
    assert len(embedder.worker.requests) == 3


async def test_incomplete_answer_is_an_error(embedder: Any) -> None:
    async def one(request: Any, context: Context) -> AsyncGenerator[Any]:
        yield {"embeddings": [[1.0]]}

    embedder.worker.script = one
    response = await embedder.http.post(PATH, json={**BODY, "input": ["a", "b"]})
    assert response.status_code == 502
    for nonsense in ({"embeddings": [[float("nan")]]}, {"token_ids": [5], "finish_reason": "stop"}, "text"):

        async def script(request: Any, context: Context, item: Any = nonsense) -> AsyncGenerator[Any]:
            yield item

        embedder.worker.script = script
        response = await embedder.http.post(PATH, json=BODY)
        assert response.status_code == 502, response.text


# --------------------------------------------------------------------------- real workers


@pytest.mark.parametrize("router_mode", ["round_robin", "kv", "least_loaded"])
async def test_workers_embed_in_every_router_mode(deployment: Deployment, router_mode: str) -> None:
    await deployment.embedding_worker()
    await deployment.embedding_worker()
    url = await deployment.frontend(router_mode=router_mode)
    await until_healthy(url, 2)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        texts = [f"text {number}" for number in range(150)]
        answers = [await client.embeddings.create(model="vectors", input=texts) for _ in range(4)]
        assert [each.index for each in answers[0].data] == list(range(150))
        assert len({tuple(each.embedding) for each in answers[0].data}) == 150
        # Both workers give the same vectors.
        assert all(answer.data == answers[0].data for answer in answers)
        assert answers[0].usage.prompt_tokens >= 150
        vector = answers[0].data[0].embedding
        assert len(vector) == 384
        assert sum(number * number for number in vector) == pytest.approx(1.0, abs=1e-5)
        short = await client.embeddings.create(model="vectors", input="text 0", dimensions=16)
        assert len(short.data[0].embedding) == 16
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            await client.embeddings.create(model="vectors", input="text 0", dimensions=1000)


async def test_killed_worker_is_replaced_by_another(
    deployment: Deployment, dynamo_redis_url: str, dynamo_redis_prefix: str
) -> None:
    """Two processes; one is killed while it has requests."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "dynamo_redis", "worker", "mock", *OPTIONS],
            env={
                **os.environ,
                "DYN_REDIS_URL": dynamo_redis_url,
                "DYN_REDIS_PREFIX": dynamo_redis_prefix,
                "DYN_LOG": "error",
            },
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    try:
        url = await deployment.frontend()
        await until_healthy(url, 2)
        async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as http:
            asking = [
                asyncio.create_task(http.post(PATH, json={**BODY, "input": [1, 2, 3, 4]})) for _ in range(6)
            ]
            async with asyncio.timeout(WITHIN_S):
                while not (await samples(SimpleNamespace(http=http), "inflight_requests")).get(
                    ""
                ) and not any(task.done() for task in asking):
                    await asyncio.sleep(0.01)
            workers[0].kill()
            answers = await asyncio.gather(*asking)
        assert [answer.status_code for answer in answers] == [200] * 6, [each.text for each in answers]
        assert len({answer.text for answer in answers}) == 1
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
