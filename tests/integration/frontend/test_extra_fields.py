"""`nvext.extra_fields`: what a client can learn of its answer beside OpenAI's fields."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.integration.frontend.conftest import Frontend

CHAT: Any = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: Any = {"model": "demo", "prompt": "Hi"}
ALL = ["worker_id", "timing", "stop_reason"]


def check(nvext: Any, before_ms: float) -> None:
    assert nvext["worker_id"] == {"prefill_worker_id": 1, "decode_worker_id": 1}
    timing = nvext["timing"]
    assert before_ms - 1000 <= timing["request_received_ms"] <= time.time() * 1000 + 1000
    assert 0 < timing["ttft_ms"] <= timing["total_time_ms"]
    assert timing["kv_hit_rate"] == 0
    assert nvext["stop_reason"] == "world"


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)], ids=["chat", "text"]
)
async def test_answers_have_the_fields_asked_for(frontend: Frontend, path: str, body: Any) -> None:
    frontend.worker.script = frontend.worker.says("Hello, world! Bye", cached_tokens=0)
    before_ms = time.time() * 1000
    asked = {**body, "stop": "world", "nvext": {"extra_fields": ALL}}
    check((await frontend.http.post(path, json=asked)).json()["nvext"], before_ms)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        answer = await frontend.http.post(path, json={**asked, "stream": True, **options})
        *chunks, end = [each.removeprefix("data: ") for each in answer.text.split("\n\n")[:-1]]
        assert end == "[DONE]"
        *others, last = [json.loads(chunk) for chunk in chunks]
        assert last["choices"] == []
        assert ("usage" in last) is bool(options)
        check(last["nvext"], before_ms)
        assert all("nvext" not in chunk for chunk in others)


async def test_answers_have_no_fields_beyond_them(frontend: Frontend) -> None:
    asked: list[Any] = [None, {}, {"extra_fields": []}, {"extra_fields": None}]
    for nvext in asked:
        answer = await frontend.http.post("/v1/completions", json={**TEXT, "nvext": nvext})
        assert "nvext" not in answer.json()
    answer = await frontend.http.post("/v1/completions", json={**TEXT, "nvext": {"extra_fields": ["timing"]}})
    assert list(answer.json()["nvext"]) == ["timing"]


@pytest.mark.parametrize(
    "changes",
    [
        {"nvext": {"extra_fields": ["routed_experts"]}},
        {"nvext": {"extra_fields": ["timing"]}, "n": 2},
        {"nvext": {"extra_fields": ["timing"]}, "prompt": ["a", "b"]},
        {"nvext": {"annotations": ["token_ids"]}},
    ],
)
async def test_other_fields_are_refused_by_name(frontend: Frontend, changes: dict[str, Any]) -> None:
    answer = await frontend.http.post("/v1/completions", json={**TEXT, **changes})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == f"nvext.{next(iter(changes['nvext']))}"
