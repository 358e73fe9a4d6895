"""The forms of responses: the parts of an answer, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from dynamo_redis.frontend.answers import AnswerDecoder
from dynamo_redis.frontend.choices import CompletionChoice, Part, Usage
from dynamo_redis.frontend.forms.base import Call, gathered
from dynamo_redis.frontend.forms.chat import ChatForm
from dynamo_redis.frontend.forms.messages import MessagesForm
from dynamo_redis.frontend.forms.responses import ResponsesForm
from dynamo_redis.frontend.responses_body import ResponsesBody
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.parsers.answer_parser import PIECE_SIZE
from dynamo_redis.parsers.deltas import CallArguments, CallBegin, Delta, Reasoning, Text
from dynamo_redis.planes.context import Context

PARTS: list[Part] = [
    Reasoning("It is "),
    Reasoning("cold."),
    Text("Let me "),
    Text("look."),
    CallBegin(0, "call_1", "weather"),
    CallArguments(0, '{"at":'),
    CallArguments(0, '"Oslo"}'),
    CallBegin(1, "call_2", "time"),
]
USAGE = Usage(prompt_count=5, answer_count=8, cached_count=3)


class Letters:
    """Detokenizes ids of letters."""

    def feed(self, token_ids: Any) -> str:
        return "".join(map(chr, token_ids))

    def finish(self) -> str:
        return ""


class Words:
    """A parser for which each word is a part, and an exclamation mark a call."""

    def __init__(self) -> None:
        self._rest = ""
        self.has_calls = False

    def passes(self, texts: list[str]) -> bool:
        return False

    def feed(self, text: str) -> list[Delta]:
        *words, self._rest = (self._rest + text).split(" ")
        self.has_calls = self.has_calls or "!" in words
        return [CallBegin(0, "call_1", "shout") if word == "!" else Text(word) for word in words]

    def finish(self, *, is_cut: bool = False) -> list[Delta]:
        return [Text(self._rest)]


def a_choice(*, parses: bool) -> CompletionChoice:
    request = GenerateRequest(
        model="m", token_ids=[1], stop_conditions={}, sampling_options={}, eos_token_ids=[]
    )
    answer = AnswerDecoder(Letters(), [])
    return CompletionChoice(0, request, answer, Context(), make_parser=Words if parses else None)


def feed(choice: CompletionChoice, text: str, reason: str | None = None) -> list[Part]:
    item = {"token_ids": list(map(ord, text)), "finish_reason": reason}
    return list(choice.parsed([choice.answer.feed(item)]))


def chunks(events: bytes) -> list[Any]:
    texts = [event.removeprefix("data: ") for event in events.decode().split("\n\n")[:-1]]
    return [json.loads(text) for text in texts]


def test_parts_gather_into_sections() -> None:
    assert gathered(PARTS) == [
        Reasoning("It is cold."),
        Text("Let me look."),
        Call("call_1", "weather", '{"at":"Oslo"}'),
        Call("call_2", "time", ""),
    ]
    assert gathered(["a", "b", Text("c")]) == [Text("abc")]


def test_choice_without_parser_delivers_texts() -> None:
    choice = a_choice(parses=False)
    assert feed(choice, "hi ! ") == ["hi ! "]
    assert feed(choice, "", "stop") == []
    assert choice.finish_reason == "stop"


def test_choice_with_parser_delivers_its_parts() -> None:
    choice = a_choice(parses=True)
    assert feed(choice, "hi th") == [Text("hi")]
    assert feed(choice, "ere ! b", "stop") == [Text("there"), CallBegin(0, "call_1", "shout"), Text("b")]
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("reason", [None, "stop"])
def test_choice_is_parsed_in_pieces_alike(reason: str | None) -> None:
    text = "word ! " * PIECE_SIZE
    at_once, in_pieces = a_choice(parses=True), a_choice(parses=True)
    in_pieces.answer.finish_reason = reason
    steps = list(in_pieces.parsed_in_pieces([text[:10], text[10:]]))
    assert len(steps) >= len(text) // PIECE_SIZE
    assert [part for parts in steps for part in parts] == feed(at_once, text, reason)


def test_restarted_choice_has_a_new_parser() -> None:
    choice = a_choice(parses=True)
    feed(choice, "a ! half")
    choice.restart()
    assert feed(choice, "whole", "length") == [Text("whole")]
    assert choice.finish_reason == "length"


def test_chat_holds_reasoning_content_and_calls() -> None:
    choice = a_choice(parses=True)
    choice.answer.finish_reason = "stop"
    choice.parts = PARTS
    body = json.loads(ChatForm("m", includes_usage=False).whole([choice], USAGE))
    message = ChatCompletion.model_validate(body, strict=True).choices[0].message
    assert message.content == "Let me look."
    assert message.model_extra == {"reasoning_content": "It is cold."}
    assert [call.function.arguments for call in message.tool_calls or [] if call.type == "function"] == [
        '{"at":"Oslo"}',
        "",
    ]


def test_chat_streams_each_part_as_a_chunk() -> None:
    encoder = ChatForm("m", includes_usage=False).encoder(a_choice(parses=True))
    found = chunks(encoder.begin() + encoder.parts(PARTS) + encoder.end("tool_calls"))
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert len(deltas) == len(PARTS) + 2
    assert [delta.get("reasoning_content") for delta in deltas[1:3]] == ["It is ", "cold."]
    assert [delta["content"] for delta in deltas[3:5]] == ["Let me ", "look."]
    assert deltas[5]["tool_calls"] == [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    ]
    assert deltas[7]["tool_calls"] == [{"index": 0, "function": {"arguments": '"Oslo"}'}}]
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


# --------------------------------------------------------------------------- messages and responses

MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
REPEATED = ResponsesBody(model="m", input="Hi").notes()


def ended(reason: str) -> CompletionChoice:
    """Return a choice whose answer has these parts, and has ended."""
    choice = a_choice(parses=True)
    choice.answer.finish_reason = reason
    choice.parts = PARTS
    return choice


def streamed(form: MessagesForm | ResponsesForm, choice: CompletionChoice, *, cut: int) -> list[Any]:
    """Return the events of an answer whose parts come in two pieces."""
    encoder = form.encoder(choice)
    events = encoder.begin() + encoder.parts(PARTS[:cut]) + encoder.parts(PARTS[cut:])
    events += encoder.end(choice.finish_reason or "") + form.end([choice], USAGE)
    found = []
    for event in events.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_message_has_a_block_for_each_section() -> None:
    body = json.loads(MessagesForm("m", wanted_tokens=8).whole([ended("stop")], USAGE))
    message = Message.model_validate(body, strict=True)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert body["content"][0]["thinking"] == "It is cold."
    assert [block["input"] for block in body["content"][2:]] == [{"at": "Oslo"}, {}]
    assert message.usage.input_tokens == 2


def test_message_hides_thinking_when_asked() -> None:
    form = MessagesForm("m", wanted_tokens=8, hides_thinking=True)
    assert json.loads(form.whole([ended("stop")], USAGE))["content"][0]["thinking"] == ""
    assert b"cold" not in form.encoder(ended("stop")).parts(PARTS)


@pytest.mark.parametrize(
    ("arguments", "whole_members"),
    [
        ("", {}),
        ("{", {}),
        ('{"at":', {}),
        ('{"at":"Os', {}),
        ('{"at":"Oslo","on":["May', {"at": "Oslo", "on": []}),
        ('{"at":"\\ud800","on', {}),
        ("[1]", {}),
        ("null", {}),
    ],
)
def test_cut_call_of_a_message_has_whole_members(arguments: str, whole_members: Any) -> None:
    choice = ended("length")
    choice.parts = [CallBegin(0, "call_1", "weather"), CallArguments(0, arguments)]
    body = json.loads(MessagesForm("m", wanted_tokens=None).whole([choice], USAGE))
    [block] = Message.model_validate(body, strict=True).content
    assert block.type == "tool_use"
    assert block.input == whole_members
    assert body["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("cut", range(len(PARTS) + 1))
def test_streamed_message_is_the_whole_one(cut: int) -> None:
    events = streamed(MessagesForm("m", wanted_tokens=8), ended("stop"), cut=cut)
    blocks: list[dict[str, Any]] = []
    for event in events:
        MESSAGE_EVENT.validate_python(event, strict=True)
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({"text": ""})
        if event["type"] == "content_block_delta":
            [text] = [value for name, value in event["delta"].items() if name != "type"]
            if event["delta"]["type"] != "signature_delta":
                blocks[event["index"]]["text"] += text
    assert [block["text"] for block in blocks] == ["It is cold.", "Let me look.", '{"at":"Oslo"}', ""]
    assert [event["type"] for event in events].count("content_block_stop") == 4
    assert [event["type"] for event in events][-2:] == ["message_delta", "message_stop"]


def test_response_has_an_item_for_each_section() -> None:
    body = json.loads(ResponsesForm("m", REPEATED).whole([ended("length")], USAGE))
    response = Response.model_validate(body, strict=True)
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in response.output] == kinds
    assert [item["status"] for item in body["output"]] == ["completed"] * 3 + ["incomplete"]
    assert response.output_text == "Let me look."
    assert response.status == "incomplete"


@pytest.mark.parametrize("cut", range(len(PARTS) + 1))
def test_streamed_response_is_the_whole_one(cut: int) -> None:
    events = streamed(ResponsesForm("m", REPEATED), ended("stop"), cut=cut)
    for number, event in enumerate(events):
        RESPONSE_EVENT.validate_python(event, strict=True)
        assert event["sequence_number"] == number
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    whole = json.loads(ResponsesForm("m", REPEATED).whole([ended("stop")], USAGE))["output"]
    assert [{**item, "id": ""} for item in done] == [{**item, "id": ""} for item in whole]
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in done]
    arguments = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(arguments) == '{"at":"Oslo"}'
