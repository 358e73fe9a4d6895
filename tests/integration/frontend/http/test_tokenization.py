"""`/tokenize`, `/detokenize` and `/version`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from dynamo_redis.frontend.tokens import Tokenizer
from tests.integration.frontend.conftest import Frontend

CHAT: Any = {"messages": [{"role": "user", "content": "Grüße <|im_end|>"}]}


async def test_tokens_are_those_of_a_completion(frontend: Frontend, demo_tokenizer: Tokenizer) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "Hello, wörld"}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "long " * 20_000}]}),
    ):
        answer = await frontend.http.post("/tokenize", json={"model": "demo", **body})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["count"] == len(found["tokens"])
        assert found["max_model_len"] == 32768
        assert found["token_strs"] is None
        await frontend.http.post(path, json={"model": "demo", "max_tokens": 1, **body})
        assert frontend.worker.requests[-1]["token_ids"] == found["tokens"]


async def test_tokens_become_text_again(frontend: Frontend) -> None:
    body = {"model": "demo", "prompt": "Hi<|im_end|>é", "return_token_strs": True}
    found = (await frontend.http.post("/tokenize", json=body)).json()
    assert "<|im_end|>" in found["token_strs"]
    for tokens, text in ((found["tokens"], "Hi<|im_end|>é"), (found["tokens"] * 1000, None), ([], "")):
        answer = await frontend.http.post("/detokenize", json={"model": "demo", "tokens": tokens})
        assert answer.status_code == 200
        assert answer.json()["prompt"] == ("Hi<|im_end|>é" * 1000 if text is None else text)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {"model": "demo"}, 400),
        ("/tokenize", {"model": "demo", "prompt": "x", **CHAT}, 400),
        ("/tokenize", {"model": "no", "prompt": "x"}, 404),
        ("/tokenize", {"model": "demo", "messages": []}, 400),
        ("/tokenize", {"model": "demo", "prompt": "x", "odd": 1}, 400),
        ("/tokenize", {"model": "demo", "prompt": ["x"]}, 400),
        ("/detokenize", {"model": "demo", "tokens": [-1]}, 400),
        ("/detokenize", {"model": "demo", "tokens": [2**31 - 1]}, 400),
        ("/detokenize", {"model": "demo", "tokens": "no"}, 400),
        ("/detokenize", {"model": "no", "tokens": [1]}, 404),
        ("/detokenize", [], 400),
    ],
)
async def test_wrong_bodies_are_refused(frontend: Frontend, path: str, body: Any, status: int) -> None:
    answer = await frontend.http.post(path, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


async def test_version_is_that_of_the_package(frontend: Frontend) -> None:
    assert (await frontend.http.get("/version")).json() == {"version": version("dynamo-redis")}
