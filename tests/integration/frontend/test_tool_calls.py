"""Tool calls and reasoning in chats, read by the official `openai` client."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import openai
import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.models.card import RuntimeConfig
from dynamo_redis.parsers.answer_parser import PIECE_SIZE, AnswerParser

MESSAGES: Any = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


async def ask(frontend: Any, answer: str, *, ends_by: str = "stop", **options: Any) -> Any:
    """Return the choice of a whole response, and check that the streamed one joins to the same."""
    worker = frontend.worker
    worker.script = worker.says(answer, finish_reason=ends_by)
    request = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, **options}
    [choice] = (await frontend.client.chat.completions.create(**request)).choices
    stream = await frontend.client.chat.completions.create(**request, stream=True)
    content, reasoning, reason = "", "", None
    calls: list[list[str]] = []
    async for chunk in stream:
        [part] = chunk.choices
        content += part.delta.content or ""
        reasoning += (part.delta.model_extra or {}).get("reasoning_content") or ""
        reason = part.finish_reason or reason
        for call in part.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls)
                assert call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
    message = choice.message
    assert content == (message.content or "")
    assert reasoning == (message.model_extra.get("reasoning_content") or "")
    assert calls == calls_of(choice)
    assert reason == choice.finish_reason
    return choice


def calls_of(choice: Any) -> list[list[str]]:
    return [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]


async def test_calls_are_fields_of_the_message(frontend: Any) -> None:
    choice = await ask(frontend, f"{WEATHER}\n{NOW}")
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert calls_of(choice) == [["get_weather", '{"city": "Łódź"}'], ["now", "{}"]]
    ids = {call.id for call in choice.message.tool_calls}
    assert len(ids) == 2
    assert all(each.startswith("call_") for each in ids)


async def test_text_beside_calls_is_content(frontend: Any) -> None:
    choice = await ask(frontend, f"Let me look. {WEATHER}")
    assert choice.message.content == "Let me look. "
    assert choice.finish_reason == "tool_calls"


async def test_malformed_calls_are_content(frontend: Any) -> None:
    choice = await ask(frontend, "<tool_call>get_weather</tool_call>")
    assert choice.message.content == "<tool_call>get_weather</tool_call>"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


async def test_cut_call_is_a_call_with_cut_arguments(frontend: Any) -> None:
    choice = await ask(frontend, f"Let me look. {NOW}{WEATHER[:-19]}", ends_by="length")
    assert choice.message.content == "Let me look. "
    assert calls_of(choice) == [["now", "{}"], ["get_weather", '{"city": "Ł']]
    assert choice.finish_reason == "length"
    history = [*MESSAGES, choice.message.to_dict()]
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "cut"} for call in choice.message.tool_calls
    ]
    answer = await ask(frontend, "Once more.", messages=[*history, *results])
    assert answer.message.content == "Once more.", "the cut call may be sent back"


async def test_calls_without_tools_are_text(frontend: Any) -> None:
    for options in ({"tools": openai.omit}, {"tool_choice": "none"}):
        choice = await ask(frontend, WEATHER, **options)
        assert choice.message.content == WEATHER
        assert choice.message.tool_calls is None


async def test_one_call_is_given_if_only_one_is_wanted(frontend: Any) -> None:
    choice = await ask(frontend, f"{WEATHER}{NOW}", parallel_tool_calls=False)
    assert calls_of(choice) == [["get_weather", '{"city": "Łódź"}']]


async def test_stop_string_ends_an_answer_before_it_is_parsed(frontend: Any) -> None:
    choice = await ask(frontend, WEATHER, stop="</tool_call>")
    assert calls_of(choice) == [["get_weather", '{"city": "Łódź"}']]
    assert choice.finish_reason == "tool_calls"


async def test_required_calls_are_guided_by_the_schemas(frontend: Any) -> None:
    answer = '[{"name": "now", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Oslo"}}]'
    choice = await ask(frontend, answer, tool_choice="required")
    assert calls_of(choice) == [["now", "{}"], ["get_weather", '{"city": "Oslo"}']]
    form = frontend.worker.requests[-1]["sampling_options"]["guided_decoding"]["json"]
    assert form["minItems"] == 1
    assert [each["properties"]["name"]["enum"] for each in form["items"]["anyOf"]] == [
        ["get_weather"],
        ["now"],
    ]
    assert form["items"]["anyOf"][0]["properties"]["parameters"] == PARAMETERS
    [call] = calls_of(await ask(frontend, WEATHER, tool_choice="required"))
    assert call[0] == "get_weather", "an engine without guided decoding answers in the model's format"


async def test_named_call_is_guided_by_its_schema(frontend: Any) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = await ask(frontend, '{"city": "Oslo"}', tool_choice=named)
    assert calls_of(choice) == [["get_weather", '{"city": "Oslo"}']]
    assert choice.finish_reason == "tool_calls"
    assert frontend.worker.requests[-1]["sampling_options"]["guided_decoding"] == {"json": PARAMETERS}


@pytest.mark.parametrize("stream", [False, True])
async def test_long_item_leaves_turns_to_others(
    frontend: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    text = NOW * 2_000
    token_ids = frontend.worker.tokenizer.encode(text)
    turn = 0
    turns: list[int] = []
    parse = AnswerParser.feed

    def feed(parser: AnswerParser, piece: str) -> Any:
        turns.append(turn)
        return parse(parser, piece)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def script(*_: object) -> AsyncGenerator[Any]:
        yield {"token_ids": token_ids, "finish_reason": "stop"}

    monkeypatch.setattr(AnswerParser, "feed", feed)
    frontend.worker.script = script
    counting = asyncio.create_task(count_turns())
    body = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "stream": stream}
    answer = await frontend.http.post("/v1/chat/completions", json=body)
    counting.cancel()
    assert answer.text.count('"arguments":') >= 2_000
    assert len(set(turns)) >= len(text) // PIECE_SIZE


async def test_choice_of_a_tool_needs_tools(frontend: Any) -> None:
    for options in ({"tools": openai.omit, "tool_choice": "required"}, {"tool_choice": "any"}):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(frontend, "", **options)
        assert caught.value.param == "tool_choice"


async def test_reasoning_is_a_field_of_the_message(frontend: Any) -> None:
    config = RuntimeConfig(reasoning_parser="qwen3")
    await frontend.runtime.publish("thinker", runtime_config=config)
    await frontend.until_served("thinker")
    answer = f"<think>\nIt is cold.\n</think>\n\nYes. {NOW}"
    choice = await ask(frontend, answer, model="thinker")
    assert choice.message.model_extra["reasoning_content"] == "It is cold.\n"
    assert choice.message.content == "Yes. "
    assert calls_of(choice) == [["now", "{}"]]
    choice = await ask(frontend, answer, model="thinker", extra_body={"separate_reasoning": False})
    assert choice.message.content == "<think>\nIt is cold.\n</think>\n\nYes. "


async def test_unknown_parser_of_a_card_leaves_plain_text(
    frontend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = RuntimeConfig(tool_call_parser="of the future", reasoning_parser="none")
        await frontend.runtime.publish("newer", runtime_config=config)
        await frontend.until_served("newer")
    [line] = [each.message for each in caplog.records if "of the future" in each.message]
    assert line.startswith("model 'newer': its card's tool_call_parser='of the future' is not known here")
    choice = await ask(frontend, WEATHER, model="newer")
    assert choice.message.content == WEATHER


async def test_tools_of_a_large_body_are_known(frontend: Any) -> None:
    config = RuntimeConfig(tool_call_parser="qwen3_coder")
    await frontend.runtime.publish("coder", runtime_config=config)
    await frontend.until_served("coder")
    properties = {"n": {"type": "integer"}, "s": {"type": "string"}}
    function = {"name": "f", "parameters": {"properties": properties}}
    answer = "<function=f><parameter=n>1</parameter><parameter=s>1</parameter></function>"
    choice = await ask(
        frontend,
        answer,
        model="coder",
        tools=[{"type": "function", "function": function}],
        extra_body={"documents": [{"text": "x" * 100_000}]},
    )
    assert calls_of(choice) == [["f", '{"n": 1, "s": "1"}']]


async def test_markers_that_are_special_tokens_are_found(frontend: Any, tmp_path: Path) -> None:
    directory = tmp_path / "special"
    shutil.copytree(DEMO_MODEL_PATH, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tokenizer = json.loads((directory / "tokenizer.json").read_bytes())
    first_id = max(tokenizer["model"]["vocab"].values()) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for token_id, content in enumerate(("[TOOL_CALLS]", "[ARGS]", "[OTHER]"), first_id):
        tokenizer["added_tokens"].append({"id": token_id, "content": content, **plain})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = RuntimeConfig(tool_call_parser="mistral")
    await frontend.runtime.publish("special", path=directory, runtime_config=config)
    await frontend.until_served("special")
    encode = frontend.worker.tokenizer.encode
    answer = [first_id + 2, first_id, *encode("now"), first_id + 1, *encode("{}"), first_id + 2]

    async def script(*_: object) -> AsyncGenerator[Any]:
        for token_id in answer:
            yield {"token_ids": [token_id]}
        yield {"token_ids": [], "finish_reason": "stop"}

    frontend.worker.script = script
    request = {"model": "special", "messages": MESSAGES}
    [choice] = (await frontend.client.chat.completions.create(**request, tools=TOOLS)).choices
    assert calls_of(choice) == [["now", "{}"]]
    assert len(choice.message.tool_calls[0].id) == 9
    assert choice.message.content is None
    [choice] = (await frontend.client.chat.completions.create(**request)).choices
    assert choice.message.content == "now{}", "without tools, special tokens have no text"
