"""OpenAI's Responses through the official `openai` client, unchanged, against the frontend."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from dynamo_redis.frontend.tokens import Tokenizer

TEXT = "Hello, world! How are you?"
BODY: dict[str, Any] = {"model": "demo", "input": "Hi!"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}


def read_events(content: str) -> list[dict[str, Any]]:
    """Read the events of a stream. Each is checked by the client's own types, and by its number."""
    events = []
    for number, event in enumerate(content.split("\n\n")[:-1]):
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        assert value["sequence_number"] == number
        EVENT.validate_python(value, strict=True)
        events.append(value)
    return events


async def prompt_of(frontend: Any, change: dict[str, Any]) -> str:
    """Return the prompt that the worker gets for a body."""
    response = await frontend.http.post("/v1/responses", json={**BODY, **change})
    assert response.status_code == 200, response.text
    text: str = frontend.worker.tokenizer.decode(frontend.worker.requests[-1]["token_ids"])
    return text


async def test_answers_a_response(frontend: Any, demo_tokenizer: Tokenizer) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, cached_tokens=3)
    answer = (await frontend.http.post("/v1/responses", json=BODY)).json()
    response = Response.model_validate(answer, strict=True)
    assert response.model_extra == {"store": False}
    assert (response.output_text, response.status, response.model) == (TEXT, "completed", "demo")
    [request] = frontend.worker.requests
    assert response.usage is not None
    assert response.usage.input_tokens == len(request["token_ids"])
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert response.usage.output_tokens == len(demo_tokenizer.encode(TEXT))
    assert "max_tokens" not in request["stop_conditions"]
    assert (await frontend.client.responses.create(**BODY)).output_text == TEXT


async def test_streams_a_response(frontend: Any, demo_tokenizer: Tokenizer) -> None:
    response = await frontend.http.post("/v1/responses", json={**BODY, "stream": True})
    events = read_events(response.text)
    count = len(demo_tokenizer.encode(TEXT))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * count,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[-1]["response"]["usage"]["output_tokens"] == count

    async with frontend.client.responses.stream(**BODY) as stream:
        async for _ in stream:
            pass
        assert (await stream.get_final_response()).output_text == TEXT


async def test_length_is_incomplete(frontend: Any) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, finish_reason="length")
    response = await frontend.client.responses.create(**BODY, max_output_tokens=16)
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert frontend.worker.requests[0]["stop_conditions"]["max_tokens"] == 16
    streamed = await frontend.http.post("/v1/responses", json={**BODY, "stream": True})
    assert [event["type"] for event in read_events(streamed.text)][-1] == "response.incomplete"


async def test_response_repeats_its_request(frontend: Any) -> None:
    repeated = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "tools": [FUNCTION],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "low", "summary": "auto"},
        "max_output_tokens": 64,
        "prompt_cache_key": "thread\u2028",
        "user": "u",
    }
    response = await frontend.client.responses.create(**BODY, **repeated, store=False)
    answer = response.to_dict()
    assert {name: answer[name] for name in repeated} == repeated
    streamed = await frontend.http.post("/v1/responses", json={**BODY, **repeated, "stream": True})
    assert read_events(streamed.text)[0]["response"]["tools"] == [FUNCTION]


# --------------------------------------------------------------------------- prompts


async def test_items_reach_the_template(frontend: Any) -> None:
    given = [
        {"role": "developer", "content": "Speak plainly."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "secret"},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"at":"Oslo"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "Snow"},
        {"role": "user", "content": "And now?"},
    ]
    prompt = await prompt_of(frontend, {"instructions": "Be brief.", "input": given})
    parts = ("Be brief.", "Speak plainly.", "Weather?", "I look.", "Snow", "And now?")
    assert all(part in prompt for part in parts)
    assert [prompt.index(part) for part in parts] == sorted(prompt.index(part) for part in parts)
    assert "secret" not in prompt


async def test_request_of_codex_is_taken(frontend: Any) -> None:
    await prompt_of(
        frontend,
        {
            "instructions": "You are a coding agent.",
            "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "tools": [FUNCTION],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "thread",
            "text": {"verbosity": "medium"},
            "client_metadata": {"x-codex-installation-id": "i"},
        },
    )


async def test_schema_is_guided_decoding(frontend: Any) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    wanted = {"type": "json_schema", "name": "person", "schema": schema, "strict": True}
    response = await frontend.client.responses.create(**BODY, text={"format": wanted})
    assert frontend.worker.requests[0]["sampling_options"]["guided_decoding"] == {"json": schema}
    assert response.text.format.type == "json_schema"


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_output_token": 3}, "max_output_token"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000_000}, "max_output_tokens"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].call_id"),
        ({"input": "word " * 300_000}, "input"),
    ],
)
async def test_refused_parameters_are_named(frontend: Any, change: dict[str, Any], param: str) -> None:
    response = await frontend.http.post("/v1/responses", json={**BODY, **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert frontend.worker.requests == []


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model":"demo"}', b"\xff", b"[" * 50_000, b""])
async def test_malformed_bodies_are_refused(frontend: Any, content: bytes) -> None:
    response = await frontend.http.post("/v1/responses", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_errors_are_those_of_the_client(frontend: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        await frontend.client.responses.create(model="other", input="Hi")
    frontend.worker.ids.clear()
    with pytest.raises(openai.InternalServerError):
        await frontend.client.responses.create(**BODY)


async def test_broken_stream_ends_as_failed(frontend: Any) -> None:
    async def script(request: Any, context: Any) -> Any:
        yield {"token_ids": frontend.worker.tokenizer.encode("Hello")}
        yield {"token_ids": "nonsense"}

    frontend.worker.script = script
    response = await frontend.http.post("/v1/responses", json={**BODY, "stream": True})
    last = read_events(response.text)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
