"""Image, audio and video parts of chats: their checks, their digest, and the chat for the engine."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from dynamo_redis.frontend.anthropic_body import MessagesBody
from dynamo_redis.frontend.http import bodies
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.media import Media, media_of
from dynamo_redis.frontend.openai import ChatBody, read_body
from dynamo_redis.frontend.options import RequestBody
from dynamo_redis.frontend.responses_body import ResponsesBody

PIXEL = "data:image/png;base64,AAAA"
TEXT = {"type": "text", "text": "Look:"}
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}
SOUND: dict[str, Any] = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
VIDEO: dict[str, Any] = {"type": "video_url", "video_url": {"url": "https://example.com/v.mp4"}}
WEATHER = {"type": "function", "function": {"name": "weather"}}


def body_of(*parts: Any, role: str = "user", **more: Any) -> bytes:
    messages = [{"role": role, "content": list(parts)}]
    return json.dumps({"model": "m", "messages": messages} | more).encode()


def media(*parts: Any, **more: Any) -> Media:
    body = read_body(ChatBody, body_of(*parts, **more))
    return media_of(body, body.media_places())


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image"}, "type"),
        ({"type": "file", "file": {}}, "type"),
        ({"type": 5}, "type"),
        ({"type": ["image_url"]}, "type"),
        ({}, "type"),
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": PIXEL}, "image_url"),
        ({"type": "image_url", "image_url": None}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": 5}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": ""}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "image_url.url"),
        ({"type": "video_url", "video_url": {"url": "ftp://host/v"}}, "video_url.url"),
        ({"type": "audio_url", "image_url": {"url": PIXEL}}, "audio_url"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "input_audio.data"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "input_audio.format"),
    ],
)
def test_refusal_names_the_field_of_the_part(part: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(ChatBody, body_of(TEXT, part))
    assert (caught.value.status, caught.value.param) == (400, f"messages[0].content[1].{param}")


MESSAGE_IMAGE: dict[str, Any] = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
}
INPUT_IMAGE = {"type": "input_image", "image_url": PIXEL}


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image", "source": {"type": "base64"}}, "source.media_type"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png"}}, "source.data"),
        ({"type": "image", "source": {**MESSAGE_IMAGE["source"], "media_type": "a;b"}}, "source.media_type"),
        ({"type": "image", "source": {"type": "url"}}, "source.url"),
        ({"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}, "source.url"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source.type"),
    ],
)
def test_refusal_names_the_field_of_an_anthropic_image(part: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(MessagesBody, body_of(TEXT, part, max_tokens=5, system="Be brief."))
    assert caught.value.param == f"messages[0].content[1].{param}"


@pytest.mark.parametrize("image", [{"file_id": "f"}, {"image_url": "file:///etc/passwd"}])
def test_refusal_names_the_field_of_an_input_image(image: Any) -> None:
    asked = [{"role": "user", "content": [{"type": "input_image", **image}]}]
    with pytest.raises(ApiError) as caught:
        read_body(ResponsesBody, json.dumps({"model": "m", "input": asked, "instructions": "x"}).encode())
    assert caught.value.param == "input[0].content[0].image_url"


def test_places_are_those_of_the_body_that_came() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [TEXT, MESSAGE_IMAGE]}
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    turns: list[Any] = [("user", "Look!"), ("assistant", [use]), ("user", [result])]
    messages = [{"role": role, "content": content} for role, content in turns]
    given = {"model": "m", "max_tokens": 5, "system": "Be brief.", "messages": messages}
    assert place_in(MessagesBody, given) == "messages[2].content[0].content[1].type"
    messages[2] = {"role": "user", "content": [result | {"content": "It is red."}, MESSAGE_IMAGE]}
    assert place_in(MessagesBody, given) == "messages[2].content[1].type"

    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [INPUT_IMAGE]}
    items = [{"role": "user", "content": "Look!"}, call, output]
    given = {"model": "m", "instructions": "Be brief.", "input": items}
    assert place_in(ResponsesBody, given) == "input[2].output[0].type"


def place_in(kind: type[RequestBody], given: dict[str, Any]) -> str:
    body = bodies.unpack(bytearray(bodies.pack(bytearray(kind.tag + json.dumps(given).encode()))))
    assert body.media is not None
    return body.media.places["image"]


def test_chat_of_another_api_is_refused_without_a_place() -> None:
    """The chat has further messages, so a place in it would be wrong."""
    with pytest.raises(ApiError) as caught:
        read_body(
            MessagesBody, body_of(MESSAGE_IMAGE, role="assistant", max_tokens=5, system="Be brief.")
        ).options()
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert "[" not in caught.value.message


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "function"])
def test_parts_stand_in_messages_of_users_and_tools(role: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(ChatBody, body_of(TEXT, IMAGE, role=role))
    assert (caught.value.status, caught.value.param) == (400, "messages[0].content[1].type")
    read_body(ChatBody, body_of(TEXT, IMAGE, role="tool"))


def test_model_refuses_modalities_it_does_not_read() -> None:
    found = media(TEXT, IMAGE, SOUND, IMAGE)
    found.check(frozenset({"image", "audio"}), "m", 1, 1 << 20)
    with pytest.raises(ApiError) as caught:
        found.check(frozenset({"image"}), "m", 1, 1 << 20)
    assert (caught.value.param, caught.value.code) == ("messages[0].content[2].type", "unsupported_content")
    assert "takes no audio parts" in caught.value.message


def test_chat_of_text_has_no_media() -> None:
    assert bodies.media_in(read_body(ChatBody, body_of(TEXT)), {}) is None


def test_digest_is_of_the_parts_and_their_order() -> None:
    digests = [
        media(*parts).digest
        for parts in ([IMAGE], [IMAGE, IMAGE], [VIDEO], [IMAGE, VIDEO], [VIDEO, IMAGE], [SOUND])
    ]
    assert len(set(digests)) == len(digests)
    assert media(TEXT, IMAGE).digest == media(IMAGE).digest


def test_engine_gets_the_chat_as_it_came() -> None:
    options = {
        "tools": [WEATHER],
        "reasoning_effort": "low",
        "chat_template_kwargs": {"b": 1},
        "documents": [{"a": 1}],
    }
    chat = {name: json.loads(bytes(value)) for name, value in media(TEXT, IMAGE, **options).chat.items()}
    assert chat == {
        "messages": [{"role": "user", "content": [TEXT, IMAGE]}],
        "tools": [WEATHER],
        "documents": [{"a": 1}],
        "chat_template_kwargs": {"b": 1, "reasoning_effort": "low", "enable_thinking": True},
    }
    assert media(IMAGE, tools=[WEATHER], tool_choice="none").chat.keys() == {"messages"}
    continued = media(IMAGE, continue_final_message=True).chat
    assert (continued["continue_final_message"], continued["add_generation_prompt"]) == (b"true", b"false")


@pytest.mark.parametrize("size", [4, 4_000_000])
def test_template_gets_placeholders_from_either_process(size: int) -> None:
    image = {"type": "image_url", "image_url": {"url": f"{PIXEL}{'A' * size}"}}
    content = body_of(TEXT, image, SOUND)
    packed = bodies.pack(bytearray(ChatBody.tag + content))
    body = bodies.unpack(bytearray(packed))
    assert isinstance(body.source, bytearray)
    assert len(body.source) < 1000
    parts = json.loads(body.source)["messages"][0]["content"]
    assert parts == [TEXT, {"type": "image"}, {"type": "audio"}]
    assert body.media == media(TEXT, image, SOUND)
    assert len(packed) > struct.calcsize("<I") + size
