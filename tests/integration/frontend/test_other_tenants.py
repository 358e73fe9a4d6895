"""Tenants' templates and large bodies do not delay other tenants' requests."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.frontend.http.body_reader import INLINE_BYTES
from dynamo_redis.names import EndpointName

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
HOLDS_THE_INTERPRETER = "{{ ([[1] * 5] * 60000) | sum(start=[]) }}"
NEVER_ENDS = (
    "{% set ns = namespace(a=[1], b=[1]) %}"
    "{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
    "{{ ns.a == ns.b }}"
)


def model_with(directory: Path, template: str) -> Path:
    """Make a model directory like the demo model's, with another chat template."""
    directory.mkdir()
    for file in DEMO_MODEL_PATH.iterdir():
        if file.is_file():
            (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return directory


async def test_template_holds_up_its_own_chats_alone(frontend: Any, tmp_path: Path) -> None:
    source = "{% if messages | length > 2 %}" + HOLDS_THE_INTERPRETER + "{% endif %}x"
    await frontend.runtime.publish("evil", path=model_with(tmp_path / "evil", source), instance_id=2)
    await frontend.until_served("evil")
    template = frontend.models.get("evil").loaded.template
    evil = asyncio.create_task(frontend.http.post(CHAT, json={"model": "evil", "messages": [USER] * 3}))
    await frontend.until(lambda: template.job_count == 1)
    assert (await frontend.http.get("/live")).status_code == 200
    other = await frontend.http.post(CHAT, json={"model": "demo", "messages": [USER]})
    assert other.status_code == 200
    assert not evil.done()
    response = await evil
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "template"
    assert "ran for too long" in response.json()["error"]["message"]
    again = await frontend.http.post(CHAT, json={"model": "evil", "messages": [USER]})
    assert again.status_code == 200


async def test_card_whose_template_never_ends_breaks_its_model_alone(frontend: Any, tmp_path: Path) -> None:
    other_endpoint = EndpointName("tenant", "backend", "generate")
    path = model_with(tmp_path / "evil", NEVER_ENDS)
    await frontend.runtime.publish("evil", path=path, instance_id=2, endpoint=other_endpoint)
    await frontend.until(lambda: "evil" in frontend.models._models)
    [model] = frontend.models._models["evil"].versions.values()
    assert (await frontend.http.get("/live")).status_code == 200
    other = await frontend.http.post(CHAT, json={"model": "demo", "messages": [USER]})
    assert other.status_code == 200
    assert model.failure is None  # it was still being tried
    await frontend.until(lambda: model.failure is not None)
    response = await frontend.http.post(CHAT, json={"model": "evil", "messages": [USER]})
    assert response.status_code == 503
    assert "does not end on a short message" in response.json()["error"]["message"]


async def test_large_conversation_waits_apart(frontend: Any, tmp_path: Path) -> None:
    """In the same model: a small chat is answered while a large one is still rendered."""
    source = (
        "{% for message in messages %}{{ message.content }}{% endfor %}"
        "{% if messages | length > 2 %}" + HOLDS_THE_INTERPRETER + "{% endif %}"
    )
    await frontend.runtime.publish("slow", path=model_with(tmp_path / "slow", source), instance_id=2)
    await frontend.until_served("slow")
    template = frontend.models.get("slow").loaded.template
    large = {"role": "user", "content": "x" * 100_000}
    waiting = asyncio.create_task(
        frontend.http.post(CHAT, json={"model": "slow", "messages": [large, USER, USER]})
    )
    await frontend.until(lambda: template.job_count == 1)
    small = await frontend.http.post(CHAT, json={"model": "slow", "messages": [USER]})
    assert small.status_code == 200
    assert not waiting.done()
    assert (await waiting).status_code == 400


async def test_large_body_is_the_same_request(frontend: Any) -> None:
    """Parsed in the process, it gives the same request as on the event loop."""
    tools = [
        {"type": "function", "function": {"name": f"f{n}", "description": "é🦙" * 40}} for n in range(150)
    ]
    options = {
        "model": "demo",
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["zzz"],
        "nvext": {"ignore_eos": True},
    }
    body = {**options, "messages": [USER], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    assert len(json.dumps(body)) > INLINE_BYTES
    prompt = ["é🦙 word " * 4000, "b"]
    ids = [[5, 6, 7] * 6000, [1]]
    for path, content in (
        (CHAT, body),
        ("/v1/completions", {**options, "prompt": prompt, "n": 2}),
        ("/v1/completions", {**options, "prompt": ids}),
    ):
        frontend.worker.requests.clear()
        large = await frontend.http.post(path, json={**content, "seed": 1})
        assert large.status_code == 200, large.text
        from_process = list(frontend.worker.requests)
        frontend.worker.requests.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dynamo_redis.frontend.http.body_reader.INLINE_BYTES", 1 << 30)
            assert (await frontend.http.post(path, json={**content, "seed": 1})).status_code == 200
        assert from_process == frontend.worker.requests


async def test_large_body_is_refused_with_the_same_words(frontend: Any) -> None:
    filler = {"messages": [{**USER, "content": "x" * 40_000}]}
    changes: list[dict[str, Any]] = [{"max_tokens": "many"}, {"nonsense": 1}, {"tools": [{"function": {}}]}]
    for change in changes:
        body = {"model": "demo", "messages": [USER], **change}
        small = await frontend.http.post(CHAT, json=body)
        large = await frontend.http.post(CHAT, json={**body, **filler})
        assert (small.status_code, small.json()) == (large.status_code, large.json())
        assert small.status_code == 400
    large = await frontend.http.post(CHAT, content=json.dumps(filler)[:-1])
    assert large.json()["error"]["code"] == "invalid_json"


async def test_tools_are_named_as_what_is_too_large(frontend: Any) -> None:
    tools = [{"function": {"name": "f", "parameters": {"description": "x" * 300_000}}}]
    body = {"model": "demo", "messages": [USER], "tools": tools, "tool_choice": "required"}
    response = await frontend.http.post(CHAT, json=body)
    assert response.status_code == 400
    assert "whole schemas if 'tool_choice' demands a call" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/detokenize", "/busy_threshold"])
async def test_limit_of_a_path_names_no_setting(frontend: Any, path: str) -> None:
    response = await frontend.http.post(path, json={"model": "demo", "tokens": "x" * (4 << 20)})
    assert response.status_code == 413
    assert "bytes (of this path)" in response.json()["error"]["message"]


async def test_body_of_many_values_is_refused(open_frontend: Any) -> None:
    """It would take twenty times its size."""
    frontend = await open_frontend(max_body_bytes="8MiB")
    content = b'{"model":"demo","messages":[{"role":"user","content":"a","x":[' + b"{},"[:3] * (2 << 20)
    content = content[:-1] + b"]}]}"
    reading = asyncio.create_task(frontend.http.post(CHAT, content=content))
    assert (await frontend.http.get("/live")).status_code == 200
    response = await reading
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_complex"
    assert (await frontend.http.post(CHAT, json={"model": "demo", "messages": [USER]})).status_code == 200


async def test_large_other_fields_are_refused(frontend: Any) -> None:
    content = {"model": "demo", "messages": [USER], "guided_json": {"const": "y" * 300_000}}
    response = await frontend.http.post(CHAT, json=content)
    assert response.status_code == 400
    assert "are over" in response.json()["error"]["message"]


def with_expression(directory: Path, expression: str) -> Path:
    """Make a model directory with a tokenizer that has a regular expression."""
    path = model_with(directory, "{{ messages[0].content }}")
    content = json.loads((path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


async def test_tokenizer_holds_up_its_own_prompts_alone(
    frontend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer with expressions may take any time: here until the other prompts are served."""
    path = with_expression(tmp_path / "evil", "(a+)+$")
    await frontend.runtime.publish("evil", path=path, instance_id=2)
    await frontend.until_served("evil")
    evil = frontend.models.get("evil").loaded.tokenizer
    encode = type(evil).encode
    begun, release = threading.Event(), threading.Event()

    def held_up(self: Any, text: str, **options: Any) -> list[int]:
        if self is evil:
            begun.set()
            assert release.wait(60)
        token_ids: list[int] = encode(self, text, **options)
        return token_ids

    monkeypatch.setattr(type(evil), "encode", held_up)
    try:
        chats = [
            asyncio.create_task(frontend.http.post(CHAT, json={"model": "evil", "messages": [USER]}))
            for _ in range(9)
        ]
        await frontend.until(begun.is_set)
        assert (await frontend.http.get("/live")).status_code == 200
        for text in ("Hi", "Hi " * 1000):
            body = {"model": "demo", "messages": [{**USER, "content": text}], "max_tokens": 1}
            assert (await frontend.http.post(CHAT, json=body)).status_code == 200
        assert not any(chat.done() for chat in chats)
    finally:
        release.set()
    assert [(await chat).status_code for chat in chats] == [200] * 9


async def test_tokenizer_that_fails_is_an_error_of_its_model(frontend: Any, tmp_path: Path) -> None:
    path = with_expression(tmp_path / "evil", "(a|aa)+$")
    await frontend.runtime.publish("evil", path=path, instance_id=2)
    await frontend.until_served("evil")
    message = {**USER, "content": "a" * 1000 + "b"}
    response = await frontend.http.post(CHAT, json={"model": "evil", "messages": [message]})
    assert response.status_code == 502
    assert "tokenizer fails" in response.json()["error"]["message"]


RAISES = "{% if messages | length > 2 %}{{ raise_exception('three are too many') }}{% endif %}x"
FAILS = "{% if messages | length > 2 %}{{ messages[0].nothing.more }}{% endif %}x"
IN_ITS_PROCESS = "{{ 'a b' | wordcount }}"
"""An operation that has a template rendered in its own process."""


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/tokenize"]
)
async def test_failing_template_is_a_clear_error(frontend: Any, tmp_path: Path, path: str) -> None:
    """In the form of each API, from a template that is rendered here or in its process; it can go on."""
    sources = {"raises": RAISES, "fails": FAILS}
    sources |= {f"{name} apart": source + IN_ITS_PROCESS for name, source in sources.items()}
    for number, (name, source) in enumerate(sources.items(), 2):
        model = model_with(tmp_path / name.replace(" ", "-"), source)
        await frontend.runtime.publish(name, path=model, instance_id=number)
    for name in sources:
        await frontend.until_served(name)
        body: dict[str, Any] = {"model": name}
        if path == "/v1/messages":
            body["max_tokens"] = 8
        field = "input" if path == "/v1/responses" else "messages"
        refused = await frontend.http.post(path, json={**body, field: [USER] * 3})
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert ("three are too many" in error["message"]) is name.startswith("raises")
        assert error["type"] == "invalid_request_error"
        assert ("code" in error) is not path.startswith("/v1/messages")
        answer = await frontend.http.post(path, json={**body, field: [USER]})
        assert answer.status_code == 200, answer.text
