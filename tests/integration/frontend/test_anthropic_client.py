"""The official `anthropic` client, unchanged, against the frontend."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from dynamo_redis.frontend.tokens import Tokenizer

TEXT = "Hello, world! How are you?"
MESSAGES: Any = [{"role": "user", "content": "Hi!"}]
BODY: dict[str, Any] = {"model": "demo", "max_tokens": 64, "messages": MESSAGES}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture
async def client(frontend: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=frontend.url, api_key="none", max_retries=0) as client:
        yield client


def read_events(content: str) -> list[dict[str, Any]]:
    """Read the events of a stream. Each is checked by the client's own types."""
    events = []
    for event in content.split("\n\n")[:-1]:
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        if value["type"] != "error":
            EVENT.validate_python(value, strict=True)
        events.append(value)
    return events


def error_type(error: anthropic.APIStatusError) -> str:
    """Return the type in the body of an error, which also names the request."""
    body: Any = error.body
    assert body["request_id"]
    kind: str = body["error"]["type"]
    return kind


async def prompt_of(frontend: Any, change: dict[str, Any]) -> str:
    """Return the prompt that the worker gets for a body."""
    response = await frontend.http.post("/v1/messages", json={**BODY, **change})
    assert response.status_code == 200, response.text
    text: str = frontend.worker.tokenizer.decode(frontend.worker.requests[-1]["token_ids"])
    return text


async def test_answers_a_message(frontend: Any, client: Any, demo_tokenizer: Tokenizer) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, cached_tokens=3)
    response = await frontend.http.post("/v1/messages", json=BODY)
    message = Message.model_validate(response.json(), strict=True)
    assert message.model_extra == {}
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": TEXT}]
    assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, "demo")
    [request] = frontend.worker.requests
    assert message.usage.input_tokens == len(request["token_ids"]) - 3
    assert message.usage.cache_read_input_tokens == 3
    assert message.usage.output_tokens == len(demo_tokenizer.encode(TEXT))
    assert request["stop_conditions"]["max_tokens"] == 64
    assert response.headers["request-id"] == response.headers["x-request-id"]

    answer = await client.messages.create(**BODY)
    assert answer.content[0].text == TEXT
    assert answer._request_id


async def test_streams_a_message(frontend: Any, client: Any, demo_tokenizer: Tokenizer) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, cached_tokens=3)
    response = await frontend.http.post("/v1/messages", json={**BODY, "stream": True})
    events = read_events(response.text)
    count = len(demo_tokenizer.encode(TEXT))
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * count,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == 3
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == count

    async with client.messages.stream(**BODY) as stream:
        assert "".join([text async for text in stream.text_stream]) == TEXT
        assert (await stream.get_final_message()).usage.output_tokens == count


async def test_counts_tokens_of_a_conversation(frontend: Any, client: Any) -> None:
    counted = await client.messages.count_tokens(model="demo", messages=MESSAGES)
    await client.messages.create(**BODY)
    assert counted.input_tokens == len(frontend.worker.requests[0]["token_ids"])
    response = await frontend.http.post(
        "/v1/messages/count_tokens", json={"model": "demo", "messages": MESSAGES}
    )
    assert MessageTokensCount.model_validate(response.json(), strict=True).model_extra == {}
    assert len(frontend.worker.requests) == 1


async def test_counts_a_prompt_over_the_context(frontend: Any) -> None:
    await frontend.runtime.publish("small", context_length=8)
    await frontend.until_served("small")
    body = {"model": "small", "messages": [{"role": "user", "content": "word " * 40}]}
    response = await frontend.http.post("/v1/messages/count_tokens", json=body)
    assert response.json()["input_tokens"] > 8


async def test_stop_sequence_is_named(frontend: Any, client: Any) -> None:
    answer = await client.messages.create(**BODY, stop_sequences=["How"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "How")
    assert answer.content[0].text == "Hello, world! "


async def test_length_is_max_tokens(frontend: Any, client: Any) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, finish_reason="length")
    assert (await client.messages.create(**BODY)).stop_reason == "max_tokens"


async def test_most_tokens_are_those_of_the_context(frontend: Any, client: Any) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, finish_reason="length")
    answer = await client.messages.create(**{**BODY, "max_tokens": 10_000_000}, timeout=20)
    assert answer.stop_reason == "model_context_window_exceeded"
    [request] = frontend.worker.requests
    [model] = frontend.models.served()
    assert request["stop_conditions"]["max_tokens"] == model.context_length - len(request["token_ids"])


async def test_lists_and_retrieves_models(frontend: Any, client: Any) -> None:
    await client.models.list()
    page = (await frontend.http.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
    [listed] = page["data"]
    model = ModelInfo.model_validate_json(json.dumps(listed), strict=True)
    assert model.model_extra == {}
    assert (model.id, page["first_id"], page["has_more"]) == ("demo", "demo", False)
    assert [each.id async for each in client.models.list()] == ["demo"]
    assert (await client.models.retrieve("demo")).created_at == model.created_at
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.models.retrieve("other")
    assert error_type(missing.value) == "not_found_error"


# --------------------------------------------------------------------------- prompts


async def test_blocks_reach_the_template(frontend: Any) -> None:
    prompt = await prompt_of(
        frontend,
        {
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cch=1234"},
                {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Ask.", "signature": "s"},
                        {"type": "redacted_thinking", "data": "secret"},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"at": "Oslo"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "toolu_1",
                            "content": "Snow",
                            "is_error": False,
                        },
                        {"type": "text", "text": "And now?"},
                    ],
                },
            ],
        },
    )
    parts = ("Be brief.", "Weather?", "I look.", "Snow", "And now?")
    assert all(part in prompt for part in parts)
    assert [prompt.index(part) for part in parts] == sorted(prompt.index(part) for part in parts)
    assert "billing" not in prompt
    assert "secret" not in prompt


async def test_last_turn_of_the_assistant_is_continued(frontend: Any) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "My name is"}]
    assert (await prompt_of(frontend, {"messages": messages})).endswith("My name is")


async def test_sampling_reaches_the_worker(frontend: Any, client: Any) -> None:
    await client.messages.create(
        **BODY,
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40},
        metadata={"user_id": "u"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14"},
    )
    [request] = frontend.worker.requests
    assert request["sampling_options"] == {"temperature": 0.5, "top_p": 0.9, "top_k": 40}
    assert "max_thinking_tokens" not in request["stop_conditions"]
    await client.messages.create(
        **{**BODY, "max_tokens": 2048}, thinking={"type": "enabled", "budget_tokens": 1024}
    )
    assert frontend.worker.requests[1]["stop_conditions"]["max_thinking_tokens"] == 1024


async def test_schema_is_guided_decoding(frontend: Any, client: Any) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    await client.messages.create(**BODY, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert frontend.worker.requests[0]["sampling_options"]["guided_decoding"] == {"json": schema}


# --------------------------------------------------------------------------- errors


async def test_errors_are_those_of_the_client(frontend: Any, client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as caught:
        await client.messages.create(**{**BODY, "max_tokens": 0})
    assert error_type(caught.value) == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(**{**BODY, "model": "other"})
    assert error_type(missing.value) == "not_found_error"
    frontend.worker.ids.clear()
    with pytest.raises(anthropic.InternalServerError) as away:
        await client.messages.create(**BODY)
    assert error_type(away.value) == "api_error"


async def test_overload_is_529(open_frontend: Any) -> None:
    frontend = await open_frontend(max_http_in_flight_count=1, max_http_queued_count=0)
    frontend.worker.script = frontend.worker.says("word " * 5000, pause_s=0.02)
    async with frontend.http.stream("POST", "/v1/messages", json={**BODY, "stream": True}) as stream:
        lines = stream.aiter_lines()
        assert await anext(lines) == "event: message_start"
        response = await frontend.http.post("/v1/messages", json=BODY)
    assert response.status_code == 529
    assert response.json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches"])
@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"model": "demo"}', b"\xff", b'{"model":"demo","messages":[]}']
)
async def test_malformed_bodies_get_its_errors(frontend: Any, path: str, content: bytes) -> None:
    response = await frontend.http.post(path, content=content)
    assert 400 <= response.status_code < 500
    error = response.json()
    assert (error["type"], type(error["error"]["message"])) == ("error", str)
    assert error["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert (await frontend.http.get(path)).json()["type"] == "error"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"container": "c"}, "'container'"),
        ({"mcp_servers": [{"type": "url"}]}, "'mcp_servers'"),
        ({"max_token": 3}, "Did you mean 'max_tokens'?"),
        ({"stop": ["x"]}, "use 'stop_sequences'"),
        ({"stop_sequences": ["x"] * 10_000}, "'stop_sequences'"),
        ({"stop_sequences": [""]}, "'stop_sequences[0]'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'tools[0].type'"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "'tools[0].defer_loading'"),
        ({"tools": [{"input_schema": {}}]}, "'tools[0].name'"),
        ({"temperature": "hot"}, "'temperature'"),
        ({"thinking": {"type": "sometimes"}}, "'thinking.type'"),
        ({"output_config": {"format": {"type": "xml"}}}, "'output_config.format.type'"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "clear_tool_uses"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'messages[0].role'"),
        ({"messages": [{"role": "user", "content": 5}]}, "'messages[0].content'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "not of type 'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content[0].text'"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "'messages[0].content[0]'"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "'messages[0].content[0]'"),
        ({"messages": [{"role": "user", "content": []}]}, "'messages'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "thinking",
        ),
    ],
)
async def test_refused_parameters_are_named(frontend: Any, change: dict[str, Any], named: str) -> None:
    response = await frontend.http.post("/v1/messages", json={**BODY, **change})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert named in response.json()["error"]["message"]
    assert frontend.worker.requests == []


async def test_broken_stream_ends_with_an_error(frontend: Any, client: Any) -> None:
    async def script(request: Any, context: Any) -> Any:
        yield {"token_ids": frontend.worker.tokenizer.encode("Hello")}
        yield {"token_ids": "nonsense"}

    frontend.worker.script = script
    response = await frontend.http.post("/v1/messages", json={**BODY, "stream": True})
    assert read_events(response.text)[-1]["error"]["type"] == "api_error"
    with pytest.raises(anthropic.APIStatusError):
        async with client.messages.stream(**BODY) as stream:
            await stream.get_final_message()
