"""Log probabilities, echo and continuous counts, as the official client parses them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from tests.integration.frontend.conftest import Frontend, Script

TEXT = "Grüße, 世界! <end>"
MESSAGES: Any = [{"role": "user", "content": "Hi!"}]


def with_logprobs(tokenizer: Tokenizer, *, gives: bool = True, size: int = 1) -> Script:
    """Answer with log probabilities, in items of some tokens."""
    ids = tokenizer.encode(TEXT)

    async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateItem]:
        for start in range(0, len(ids), size):
            item: GenerateItem = {"token_ids": ids[start : start + size]}
            if gives:
                item["log_probs"] = [-0.5] * len(item["token_ids"])
                item["log_probs"][0] = float("-inf")
                item["top_logprobs"] = [
                    [{"token_id": each, "logprob": -0.25}, {"token_id": 65, "logprob": -2}]
                    for each in item["token_ids"]
                ]
            if start + size >= len(ids):
                item["finish_reason"] = "stop"
            yield item

    return script


def check(tokens: list[Any]) -> None:
    """Check the log probabilities of a whole chat's tokens."""
    assert b"".join(bytes(each.bytes) for each in tokens).decode() == TEXT
    assert tokens[0].logprob == -9999.0
    assert [len(each.top_logprobs) for each in tokens] == [1] * len(tokens)
    assert tokens[-1].top_logprobs[0].token == tokens[-1].token


@pytest.mark.parametrize("size", [1, 3])
async def test_chat_has_logprobs(frontend: Frontend, demo_tokenizer: Tokenizer, size: int) -> None:
    frontend.worker.script = with_logprobs(demo_tokenizer, size=size)
    asked: Any = {"model": "demo", "messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    answer = await frontend.client.chat.completions.create(**asked)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].logprobs is not None
    check(answer.choices[0].logprobs.content or [])
    stream = await frontend.client.chat.completions.create(**asked, stream=True)
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    check(
        [
            token
            for chunk in chunks
            if chunk.choices[0].logprobs is not None
            for token in chunk.choices[0].logprobs.content or []
        ]
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [request["output_options"] for request in frontend.worker.requests] == [{"logprobs": 1}] * 2


async def test_text_has_logprobs(frontend: Frontend, demo_tokenizer: Tokenizer) -> None:
    frontend.worker.script = with_logprobs(demo_tokenizer)
    asked: Any = {"model": "demo", "prompt": "Hi", "logprobs": 2}
    answer = await frontend.client.completions.create(**asked)
    Completion.model_validate(answer.model_dump(), strict=True)
    whole = answer.choices[0].logprobs
    assert whole is not None
    assert whole.tokens is not None
    assert whole.text_offset is not None
    assert len(whole.tokens) == len(whole.text_offset) == len(whole.top_logprobs or []) > 5
    assert whole.text_offset[:2] == [0, len(whole.tokens[0])]
    stream = await frontend.client.completions.create(**asked, stream=True)
    parts = [chunk.choices[0].logprobs async for chunk in stream]
    assert [token for part in parts if part for token in part.tokens or []] == whole.tokens
    assert [each for part in parts if part for each in part.text_offset or []] == whole.text_offset


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_without_logprobs_is_an_error(
    frontend: Frontend, demo_tokenizer: Tokenizer, *, stream: bool
) -> None:
    frontend.worker.script = with_logprobs(demo_tokenizer, gives=False)
    with pytest.raises(openai.BadRequestError, match="returns no log probabilities"):
        await frontend.client.chat.completions.create(
            model="demo", messages=MESSAGES, logprobs=True, stream=stream
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(frontend: Frontend, *, stream: bool) -> None:
    frontend.worker.script = frontend.worker.says("there. Stop it")
    answer: Any = await frontend.client.completions.create(
        model="demo", prompt=["Stop? Hello ", "Hé "], echo=True, stop="Stop", stream=stream
    )
    texts = ["", ""]
    for chunk in [chunk async for chunk in answer] if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["Stop? Hello there. ", "Hé there. "]


@pytest.mark.parametrize("kind", ["chat", "text"])
async def test_each_chunk_counts_tokens(frontend: Frontend, demo_tokenizer: Tokenizer, kind: str) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    if kind == "chat":
        stream: Any = await frontend.client.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, stream_options=options
        )
    else:
        stream = await frontend.client.completions.create(
            model="demo", prompt="Hi", stream=True, stream_options=options
        )
    chunks = [chunk async for chunk in stream]
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(demo_tokenizer.encode("Hello, world! How are you?"))
    assert {chunk.usage.total_tokens - chunk.usage.completion_tokens for chunk in chunks} == {
        len(frontend.worker.requests[0]["token_ids"])
    }
