"""Tools and reasoning through Messages and Responses, with the official clients."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic import beta_async_tool
from anthropic.types import RawMessageStreamEvent
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from dynamo_redis.models.card import RuntimeConfig

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
CUT_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "on": "Mo'
THOUGHT = "<think>\nI should look.\n</think>\n\n"
ANSWER = "It snows."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
MESSAGE: dict[str, Any] = {
    "model": "thinker",
    "max_tokens": 256,
    "messages": [{"role": "user", "content": "Weather?"}],
    "tools": [{"name": "get_weather", "description": "Tells the weather.", "input_schema": SCHEMA}],
}
RESPONSE: dict[str, Any] = {
    "model": "thinker",
    "input": [{"role": "user", "content": "Weather?"}],
    "tools": [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}],
}
MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
async def agent(frontend: Any) -> Any:
    """Yield a frontend with a model that thinks, calls its tool, and answers once it has the result."""
    worker = frontend.worker

    async def script(request: Any, context: Any) -> AsyncGenerator[Any]:
        prompt = worker.tokenizer.decode(request["token_ids"])
        says = worker.says(ANSWER if "Snow, -3" in prompt else THOUGHT + CALL)
        async for item in says(request, context):
            yield item

    worker.script = script
    await frontend.runtime.publish("thinker", runtime_config=RuntimeConfig(reasoning_parser="qwen3"))
    await frontend.until_served("thinker")
    return frontend


@pytest.fixture
async def client(agent: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=agent.url, api_key="none", max_retries=0) as client:
        yield client


def read(content: str, kind: TypeAdapter[Any]) -> list[dict[str, Any]]:
    """Read the events of a stream. Each is checked by the client's own types."""
    values = [json.loads(event.partition("data: ")[2]) for event in content.split("\n\n")[:-1]]
    for value in values:
        kind.validate_python(value, strict=True)
    return values


# --------------------------------------------------------------------------- messages


async def test_message_has_thinking_and_call(client: Any) -> None:
    answer = await client.messages.create(**MESSAGE)
    thinking, call = answer.content
    assert (thinking.type, thinking.thinking.strip()) == ("thinking", "I should look.")
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Łódź"})
    assert answer.stop_reason == "tool_use"


async def test_tokens_of_reasoning_are_counted(agent: Any, client: Any) -> None:
    reasoning_count = len(agent.worker.tokenizer.encode(THOUGHT.strip()))
    whole = await client.messages.create(**MESSAGE)
    async with client.messages.stream(**MESSAGE) as stream:
        streamed = await stream.get_final_message()
    for answer in (whole, streamed):
        assert answer.usage.output_tokens_details.thinking_tokens == reasoning_count
        assert answer.usage.output_tokens > reasoning_count
    chat = {"model": "thinker", "messages": MESSAGE["messages"]}
    completion = await agent.client.chat.completions.create(**chat)
    stream = await agent.client.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}
    )
    usages = [completion.usage, [chunk async for chunk in stream][-1].usage]
    for usage in usages:
        assert usage.completion_tokens_details.reasoning_tokens == reasoning_count
    response = await agent.client.responses.create(**RESPONSE)
    assert response.usage.output_tokens_details.reasoning_tokens == reasoning_count
    plain = await agent.client.chat.completions.create(**chat, extra_body={"separate_reasoning": False})
    assert plain.usage.completion_tokens_details is None


async def test_streamed_message_is_the_whole_one(agent: Any, client: Any) -> None:
    async with client.messages.stream(**MESSAGE) as stream:
        streamed = await stream.get_final_message()
    whole = await client.messages.create(**MESSAGE)
    shown = [
        [block.model_dump(exclude={"id", "signature"}) for block in each.content]
        for each in (streamed, whole)
    ]
    assert shown[0] == shown[1]
    assert streamed.stop_reason == "tool_use"
    response = await agent.http.post("/v1/messages", json={**MESSAGE, "stream": True})
    events = read(response.text, MESSAGE_EVENT)
    assert {event["delta"]["type"] for event in events if event["type"] == "content_block_delta"} == {
        "thinking_delta",
        "signature_delta",
        "input_json_delta",
    }


async def test_tool_runner_of_the_client_ends(client: Any) -> None:
    """Runs the client's own loop of calls and results."""

    @beta_async_tool
    async def get_weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: the place.
        """
        return f"Snow, -3 in {city}"

    runner = client.beta.messages.tool_runner(
        model="thinker", max_tokens=256, messages=MESSAGE["messages"], tools=[get_weather]
    )
    messages = [message async for message in runner]
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert messages[-1].content[-1].text == ANSWER


async def test_result_with_an_error_reaches_the_model(agent: Any, client: Any) -> None:
    first = await client.messages.create(**MESSAGE)
    result = {
        "type": "tool_result",
        "tool_use_id": first.content[-1].id,
        "is_error": True,
        "content": "Snow, -3",
    }
    turns = [
        *MESSAGE["messages"],
        {"role": "assistant", "content": [block.to_dict() for block in first.content]},
        {"role": "user", "content": [result]},
    ]
    answer = await client.messages.create(**{**MESSAGE, "messages": turns})
    assert answer.content[-1].text == ANSWER


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
async def test_message_can_demand_a_call(agent: Any, client: Any, choice: dict[str, Any]) -> None:
    await client.messages.create(**MESSAGE, tool_choice={**choice, "disable_parallel_tool_use": True})
    guided = agent.worker.requests[0]["sampling_options"]["guided_decoding"]["json"]
    assert "get_weather" in json.dumps(guided) or guided == SCHEMA


async def test_message_names_a_missing_tool(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="not among the 'tools'"):
        await client.messages.create(**MESSAGE, tool_choice={"type": "tool", "name": "other"})


async def test_cut_call_of_a_message_is_a_tool_use(agent: Any, client: Any) -> None:
    agent.worker.script = agent.worker.says(CUT_CALL, finish_reason="length")
    request = {**MESSAGE, "max_tokens": 32}
    async with client.messages.stream(**request) as stream:
        streamed = await stream.get_final_message()
    whole = await client.messages.create(**request)
    for message in (streamed, whole):
        [block] = message.content
        assert (block.type, block.name, block.input) == ("tool_use", "get_weather", {"city": "Oslo"})
        assert message.stop_reason == "max_tokens"
        result = {
            "type": "tool_result",
            "tool_use_id": block.id,
            "content": "Snow, -3: cut off",
            "is_error": True,
        }
        turns = [
            *MESSAGE["messages"],
            {"role": "assistant", "content": [block.to_dict()]},
            {"role": "user", "content": [result]},
        ]
        assert (await client.messages.create(**{**MESSAGE, "messages": turns})).content


# --------------------------------------------------------------------------- responses


async def test_cut_call_of_a_response_is_incomplete(agent: Any) -> None:
    agent.worker.script = agent.worker.says(CUT_CALL, finish_reason="length")
    async with agent.client.responses.stream(**RESPONSE) as stream:
        *_, last = [event async for event in stream]
    whole = await agent.client.responses.create(**RESPONSE)
    assert last.type == "response.incomplete"
    calls = []
    for response in (last.response, whole):
        [call] = response.output
        calls.append(call)
        assert (call.type, call.status) == ("function_call", "incomplete")
        assert call.arguments == '{"city": "Oslo", "on": "Mo'
        assert response.incomplete_details.reason == "max_output_tokens"
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "cut off"}
    given = [*RESPONSE["input"], calls[0].to_dict(), result]
    assert (await agent.client.responses.create(**{**RESPONSE, "input": given})).output


async def test_response_has_reasoning_and_call(agent: Any) -> None:
    response = await agent.client.responses.create(**RESPONSE)
    reasoning, call = response.output
    assert (reasoning.type, reasoning.content[0].text.strip()) == ("reasoning", "I should look.")
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Łódź"},
    )
    assert response.status == "completed"


async def test_streamed_response_is_the_whole_one(agent: Any) -> None:
    response = await agent.http.post("/v1/responses", json={**RESPONSE, "stream": True})
    events = read(response.text, RESPONSE_EVENT)
    assert events[-1]["type"] == "response.completed"
    whole = await agent.http.post("/v1/responses", json=RESPONSE)
    ids = {"id": "", "call_id": ""}
    streamed = [{**item, **ids} for item in events[-1]["response"]["output"]]
    assert streamed == [{**item, **ids} for item in whole.json()["output"]]


async def test_loop_over_responses_ends(agent: Any) -> None:
    given = list(RESPONSE["input"])
    texts = []
    for _ in range(4):
        async with agent.client.responses.stream(**{**RESPONSE, "input": given}) as stream:
            async for _event in stream:
                pass
            response = await stream.get_final_response()
        given += [item.to_dict() for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        texts.append(response.output_text)
        if not calls:
            break
        given += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "Snow, -3"} for call in calls
        ]
    assert texts == ["", ANSWER]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
async def test_response_can_demand_a_call(agent: Any, choice: Any) -> None:
    await agent.client.responses.create(**RESPONSE, tool_choice=choice, parallel_tool_calls=False)
    guided = agent.worker.requests[0]["sampling_options"]["guided_decoding"]["json"]
    assert "get_weather" in json.dumps(guided) or guided == SCHEMA


async def test_response_names_a_missing_tool(agent: Any) -> None:
    body = {**RESPONSE, "tool_choice": {"type": "function", "name": "other"}}
    error = (await agent.http.post("/v1/responses", json=body)).json()["error"]
    assert error["param"] == "tool_choice.name"
