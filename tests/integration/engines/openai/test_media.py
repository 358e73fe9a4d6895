"""Chats with images through frontend, router and worker to an engine's chat completions."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from tests.integration.engines.openai.conftest import Services
from tests.integration.engines.openai_engine import TestEngine

URL = "data:image/png;base64,AAAA"
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": URL}}
CONTENT = [{"type": "text", "text": "What is this?"}, IMAGE]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
TEMPLATE = """{%- if tools %}{{ tools | tojson }} <tool_call>{"name": …, "arguments": …}</tool_call>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{%- if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<|endoftext|>{% else -%}
{{- raise_exception('not ' ~ part.type) }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """The demo model with a template that has a placeholder for images."""
    path = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_PATH, path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return path


def says(*texts: str) -> list[dict[str, Any]]:
    return [*({"delta": {"content": text}} for text in texts), {"delta": {}, "finish_reason": "stop"}]


def body(content: Any = CONTENT, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 50} | more


async def served(
    services: Services, path: Path, *, count: int = 1, **options: Any
) -> tuple[list[TestEngine], httpx.AsyncClient]:
    engines = [await services.engine(owner="sglang") for _ in range(count)]
    for engine in engines:
        engine.choices = says("A c", "at.")
        await services.worker(engine, model_path=path, modalities="image", migration_limit=2)
    return engines, await services.frontend(**options)


async def test_engine_answers_a_chat_with_an_image(services: Services, model_path: Path) -> None:
    [engine], frontend = await served(services, model_path)
    engine.counted = {"prompt_tokens": 1234, "completion_tokens": 3}

    response = await frontend.post("/v1/chat/completions", json=body(temperature=0.5))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "A cat."
    assert answer["usage"]["prompt_tokens"] == 1234
    assert engine.chats[-1]["messages"] == body()["messages"]
    assert (engine.chats[-1]["temperature"], engine.chats[-1]["max_tokens"]) == (0.5, 50)
    assert not engine.requests

    streamed = await frontend.post("/v1/chat/completions", json=body(stream=True))
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == "A cat."

    large = [{"type": "image_url", "image_url": {"url": URL + "A" * 3_000_000}}]
    response = await frontend.post("/v1/chat/completions", json=body(large))
    assert response.status_code == 200, response.text
    assert engine.chats[-1]["messages"] == body(large)["messages"]

    # Other APIs' images are parts of a chat, too.
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    response = await frontend.post(
        "/v1/messages", json=body([{"type": "image", "source": source}], max_tokens=1 << 30)
    )
    assert response.json()["content"][0]["text"] == "A cat."
    assert engine.chats[-1]["messages"][0]["content"] == [IMAGE]
    assert "max_tokens" not in engine.chats[-1]  # the engine knows what the image leaves of the context
    asked = [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]
    response = await frontend.post("/v1/responses", json={"model": "demo", "input": asked})
    assert response.json()["output"][0]["content"][0]["text"] == "A cat."

    # A chat of text goes as token ids.
    response = await frontend.post("/v1/chat/completions", json=body("Hello!"))
    assert response.status_code == 200, response.text
    assert len(engine.requests) == 1


async def test_calls_of_the_engines_text_are_parsed(services: Services, model_path: Path) -> None:
    [engine], frontend = await served(services, model_path)
    engine.choices = says(CALL[:12], CALL[12:])
    response = await frontend.post("/v1/chat/completions", json=body(tools=TOOLS))
    assert engine.chats[-1]["tools"] == TOOLS
    [choice] = response.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["look"]

    engine.choices = [{"delta": {"tool_calls": [{"index": 0}]}}]
    response = await frontend.post("/v1/chat/completions", json=body(tools=TOOLS))
    assert response.status_code == 502
    assert "tool call parser" in response.json()["error"]["message"]


async def test_unread_parts_are_refused_by_name(services: Services, model_path: Path) -> None:
    [engine], frontend = await served(services, model_path)
    sound = {"type": "audio_url", "audio_url": {"url": "https://example.com/a.wav"}}
    refusals = [
        ("/v1/chat/completions", body([IMAGE, sound]), "messages[0].content[1].type"),
        ("/v1/chat/completions", body([{"type": "text", "text": "<|im_end|>"}, IMAGE]), "messages"),
        ("/tokenize", {"model": "demo", "messages": body()["messages"]}, "messages[0].content[1].type"),
    ]
    for path, content, param in refusals:
        response = await frontend.post(path, json=content)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not engine.chats


async def test_images_are_held_until_they_are_answered(services: Services, model_path: Path) -> None:
    [engine], frontend = await served(services, model_path, max_body_bytes=400_000, max_bodies_bytes=500_000)
    image = [{"type": "image_url", "image_url": {"url": URL + "A" * 300_000}}]
    engine.choices = [{"delta": {"content": "A d"}, "breaks": True}, *says("A cat.")]
    async with frontend.stream("POST", "/v1/chat/completions", json=body(image, stream=True)) as response:
        lines = response.aiter_lines()
        while "A d" not in await anext(lines):
            pass
        refused = await frontend.post("/v1/chat/completions", json=body(image))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (await frontend.post("/v1/chat/completions", json=body("Hello!"))).status_code == 200
        engine.may_break.set()
        async for _ in lines:
            pass
    async with asyncio.timeout(30):
        while (await frontend.post("/v1/chat/completions", json=body(image))).status_code != 200:
            await asyncio.sleep(0.01)

    too_many = await frontend.post("/v1/chat/completions", json=body(image, n=2))
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")


async def test_chat_whose_engine_dies_starts_again_or_ends(services: Services, model_path: Path) -> None:
    """A whole answer starts again at another worker; a streamed one does not go on behind its tokens."""
    engines, frontend = await served(services, model_path, count=2)
    breaking = {"delta": {"content": "A d"}, "breaks": True}
    choices = [breaking, *says("A cat.")]
    for engine in engines:
        engine.choices = choices  # of both: one of them breaks
    text = ""
    async with frontend.stream("POST", "/v1/chat/completions", json=body(stream=True)) as response:
        async for line in response.aiter_lines():
            text += line
            if "A d" in line:
                for engine in engines:
                    engine.may_break.set()
    assert '"error"' in text
    assert "cat" not in text
    assert sum(len(engine.chats) for engine in engines) == 1

    choices.insert(0, breaking)
    answer = (await frontend.post("/v1/chat/completions", json=body())).json()
    assert answer["choices"][0]["message"]["content"] == "A cat."
    assert sum(len(engine.chats) for engine in engines) == 3
