"""Bad input to each API: a clear error in the form of the API, never a 5xx, and no request to a worker."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.frontend.conftest import Frontend

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES},
    "/v1/completions": {"model": "demo", "prompt": "Hi"},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 8},
    "/v1/messages/count_tokens": {"model": "demo", "messages": MESSAGES},
    "/v1/responses": {"model": "demo", "input": "Hi"},
    "/tokenize": {"model": "demo", "prompt": "Hi"},
    "/detokenize": {"model": "demo", "tokens": [1]},
}
GENERATING = [
    path for path in GOOD if "tokenize" not in path and "count" not in path and path != "/v1/messages"
]
LONG = "word " * 60_000

NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"hello",
    "half an object": b'{"model": "demo"',
    "two values": b"{} {}",
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "bytes that are no UTF-8": b'{"model": "\xff\xfe"}',
    "overlong UTF-8": b'{"model": "\xc0\xaf"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "a byte order mark": b"\xef\xbb\xbf{",
    "single quotes": b"{'model': 'demo'}",
}
"""Bodies that no API takes."""

CHANGES: dict[str, Any] = {
    "model of another type": {"model": 5},
    "no model": {"model": None},
    "a model with a lone surrogate": {"model": "\ud800"},
    "a long model": {"model": "m" * 100_000},
    "unknown parameter": {"of_tomorrow": 1},
    "unknown parameter with a long name": {"n" * 10_000: 1},
}
"""Changes of a body that each API refuses."""

GENERATING_CHANGES: dict[str, Any] = {
    "NaN": {"temperature": float("nan")},
    "infinity": {"temperature": float("inf")},
    "a number over 64 bits": {"seed": 10**400},
    "a text for a number": {"temperature": "1"},
    "no temperature at all": {"temperature": -1},
    "a probability over one": {"top_p": 1.5},
    "stream of another type": {"stream": "yes"},
}

PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LONG}]},
    "/v1/completions": {"prompt": LONG},
    "/v1/messages": {"messages": [{"role": "user", "content": LONG}]},
    "/v1/responses": {"input": LONG},
}


def check(path: str, answer: Any, name: str) -> None:
    """Check a refusal, in the form of the API."""
    assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text[:200])
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error", name
    assert body["error"]["message"], name
    assert len(answer.content) < 4096, name


@pytest.mark.parametrize("path", GOOD)
async def test_bad_bodies_are_refused(frontend: Frontend, path: str) -> None:
    good = GOOD[path]
    for name, content in NOT_JSON.items():
        check(path, await frontend.http.post(path, content=content), name)
    changes = CHANGES | (GENERATING_CHANGES if path in GENERATING else {})
    for name, change in changes.items():
        content = json.dumps({**good, **change}).encode()
        check(path, await frontend.http.post(path, content=content), name)
    assert not frontend.worker.requests
    answer = await frontend.http.post(path, json=good)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", PROMPTS)
async def test_prompts_over_the_context_are_refused(frontend: Frontend, path: str) -> None:
    answer = await frontend.http.post(path, json={**GOOD[path], **PROMPTS[path]})
    check(path, answer, path)
    assert "context" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_limits_out_of_range_are_refused(frontend: Frontend, path: str) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": 10**12},
        {"min_tokens": -1},
        {"n": 0},
        {"n": 10**9},
        {"stop": ["s"] * 10_000},
        {"stop": "s" * 100_000},
        {"stop": ["\ud800"] * 5},
        {"stop_token_ids": [-1]},
        {"logit_bias": {"1" * 400: 1}},
        {"logit_bias": {str(i): 1 for i in range(40_000, 60_000)}},
        {"bad_words": ["w"] * 100_000},
        {"top_k": -5},
        {"seed": 2**70},
        {"cache_salt": "s" * 1000},
        {"stream_options": []},
        {"nvext": 7},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
    )
    for change in changes:
        answer = await frontend.http.post(path, content=json.dumps({**GOOD[path], **change}).encode())
        check(path, answer, str(change)[:80])
    assert not frontend.worker.requests


async def test_odd_texts_and_large_tools_are_no_defect(frontend: Frontend) -> None:
    """They are answered, or refused: a template may write what it wants of them."""
    tool = {"type": "function", "function": {"name": "f", "description": "d" * 1_000_000}}
    nested: Any = {"type": "object"}
    for _ in range(150):
        nested = {"type": "object", "properties": {"a": nested}}
    deep = {"type": "function", "function": {"name": "f", "parameters": nested}}
    for body in (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "\x00\x7f\ufdd0\ufffe<|im_end|>"}]},
        {"messages": [{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDF0))) + "<|im_end|>"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 2000}]},
        {"messages": MESSAGES, "tools": [tool]},
        {"messages": MESSAGES, "tools": [deep]},
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}] * 3000},
        {"messages": MESSAGES, "chat_template_kwargs": {"a" * 1000: ["b"] * 1000}},
        {"messages": [{"role": "user", "content": "Hi"}] * 5000},
    ):
        content = json.dumps({"model": "demo", "max_tokens": 4, **body}).encode()
        answer = await frontend.http.post("/v1/chat/completions", content=content)
        assert answer.status_code < 500, (str(body)[:100], answer.text[:300])


def deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        found = {"a": found}
    return found


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"])
async def test_deep_schemas_are_a_clear_error(frontend: Frontend, path: str) -> None:
    for levels, statuses in ((100, (200,)), (140, (200, 400)), (190, (200, 400)), (250, (400,))):
        tool: dict[str, Any] = {"name": "f", "parameters": deep(levels)}
        if path == "/v1/messages":
            tool = {"name": "f", "input_schema": {"type": "object", "properties": deep(levels)}}
        elif path == "/v1/responses":
            tool = {"type": "function", **tool}
        else:
            tool = {"type": "function", "function": tool}
        body = {**GOOD["/v1/chat/completions" if path == "/tokenize" else path], "tools": [tool]}
        answer = await frontend.http.post(path, content=json.dumps(body).encode())
        assert answer.status_code in statuses, (levels, answer.text[:300])
        if answer.status_code == 400:
            check(path, answer, str(levels))
        if levels == 250:
            assert "recursion limit" in answer.json()["error"]["message"]
