"""Messages and Responses on the way of a chat: large bodies, clients that leave, counts, rubbish."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "demo", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi!"}]},
    "/v1/responses": {"model": "demo", "input": "Hi!"},
}
ENDPOINTS = {"/v1/messages": "anthropic_messages", "/v1/responses": "responses"}
LARGE_SCHEMA = {
    "type": "object",
    "properties": {f"field_{number}": {"type": "string", "description": "x" * 80} for number in range(9000)},
}

each_api = pytest.mark.parametrize("path", BODIES)


async def samples(frontend: Any, name: str) -> dict[str, float]:
    """Return the values of a metric of the frontend, by endpoint."""
    text = (await frontend.http.get("/metrics")).text
    return {
        sample.labels.get("endpoint", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"dynamo_frontend_{name}"
    }


@each_api
async def test_large_conversation_is_answered(frontend: Any, path: str) -> None:
    text = "word " * 20_000
    change = {"system": text} if path == "/v1/messages" else {"instructions": text}
    response = await frontend.http.post(path, json={**BODIES[path], **change})
    assert response.status_code == 200, response.text
    prompt = frontend.worker.tokenizer.decode(frontend.worker.requests[-1]["token_ids"])
    assert text.strip() in prompt
    assert "Hi!" in prompt


async def test_schema_of_a_megabyte_is_repeated(open_frontend: Any) -> None:
    frontend = await open_frontend(model=None)
    await frontend.runtime.publish("demo", context_length=1 << 22)
    await frontend.until_served("demo")
    tool = {"type": "function", "name": "f", "parameters": LARGE_SCHEMA, "strict": False}
    response = await frontend.http.post("/v1/responses", json={**BODIES["/v1/responses"], "tools": [tool]})
    assert response.status_code == 200, response.text
    assert response.json()["tools"] == [tool]


@each_api
async def test_client_that_leaves_ends_its_request(frontend: Any, path: str) -> None:
    frontend.worker.script = frontend.worker.says("word " * 5000, pause_s=0.02)
    async with frontend.http.stream("POST", path, json={**BODIES[path], "stream": True}) as stream:
        await anext(stream.aiter_bytes())
        assert await samples(frontend, "inflight_requests") == {"": 1}
    await frontend.until(lambda: frontend.worker.ended == ["closed"])
    assert frontend.worker.contexts[0].is_killed()
    assert await samples(frontend, "inflight_requests") == {"": 0}
    assert await samples(frontend, "queued_requests") == {"": 0}


@each_api
async def test_requests_are_counted_by_endpoint(frontend: Any, path: str) -> None:
    await frontend.http.post(path, json=BODIES[path])
    await frontend.http.post(path, json={**BODIES[path], "stream": True})
    await frontend.http.post(path, json={})
    assert ENDPOINTS[path] in await samples(frontend, "requests_total")
    assert (await samples(frontend, "requests_refused_total"))[ENDPOINTS[path]] == 1
    assert await samples(frontend, "inflight_requests") == {"": 0}


RUBBISH: dict[str, bytes] = {
    "nan": b'{"temperature": NaN}',
    "infinity": b'{"top_p": 1e999}',
    "huge number": b'{"max_tokens": 1' + b"0" * 400 + b', "max_output_tokens": 1' + b"0" * 400 + b"}",
    "negative": b'{"max_tokens": -1, "max_output_tokens": -1}',
    "deep": b'{"tools": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "list": b"[1, 2]",
    "key twice": b'{"model": 5, "model": null}',
    "lone surrogate": b'{"messages": [{"role": "\\ud800"}], "input": [{"role": "\\ud800"}]}',
    "type is a map": b'{"messages": [{"role": "user", "content": [{"type": {}}]}], "input": [{"type": {}}]}',
    "nulls": b'{"messages": null, "input": null, "model": null}',
    "zero byte": b'{"model": "\\u0000"}',
}


@each_api
@pytest.mark.parametrize("case", RUBBISH)
async def test_rubbish_is_refused(frontend: Any, path: str, case: str) -> None:
    content = RUBBISH[case]
    further = {name: value for name, value in BODIES[path].items() if f'"{name}"' not in str(content)}
    if content.startswith(b"{"):
        content = content[:-1] + b", " + json.dumps(further)[1:].encode()
    for target in (path, *(("/v1/messages/count_tokens",) if path == "/v1/messages" else ())):
        response = await frontend.http.post(target, content=content)
        assert 400 <= response.status_code < 500, response.text
        error = response.json()
        assert error["error"]["type"] in ("invalid_request_error", "not_found_error", "request_too_large")
        assert ("request_id" in error) == (path == "/v1/messages")


@each_api
async def test_image_is_refused(frontend: Any, path: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    image: dict[str, Any] = {"type": "image", "source": source}
    name = "messages"
    if path == "/v1/responses":
        image, name = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "input"
    response = await frontend.http.post(
        path, json={**BODIES[path], name: [{"role": "user", "content": [image]}]}
    )
    assert response.status_code == 400
    assert f"'{name}[0].content[0].type'" in response.json()["error"]["message"]


@each_api
async def test_odd_text_is_answered(frontend: Any, path: str) -> None:
    text = "\\u0000 <|im_end|> \\u2028 <think>"
    body = json.dumps(BODIES[path]).replace("Hi!", text).encode()
    response = await frontend.http.post(path, content=body)
    assert response.status_code == 200, response.text
