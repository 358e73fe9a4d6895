"""The official `openai` client, unchanged, against the frontend."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, CompletionUsage, ErrorObject, Model
from openai.types.chat import ChatCompletionChunk

from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context

TEXT = "Hello, world! How are you?"
MESSAGES: Any = [{"role": "user", "content": "Hi!"}]


async def test_lists_and_retrieves_models(frontend: Any) -> None:
    models = await frontend.client.models.list()
    assert [model.id for model in models.data] == ["demo"]
    model = await frontend.client.models.retrieve("demo")
    assert (model.id, model.object) == ("demo", "model")
    assert abs(model.created - time.time()) < 60


def strictly(kind: Any, content: Any) -> Any:
    """Read content by a type of the official client, without any conversion."""
    return kind.model_validate_json(json.dumps(content), strict=True)


async def test_models_have_the_types_of_the_client(frontend: Any) -> None:
    listed = (await frontend.http.get("/v1/models")).json()
    retrieved = (await frontend.http.get("/v1/models/demo")).json()
    assert listed == {"object": "list", "data": [retrieved]}
    model = strictly(Model, retrieved)
    assert set(model.model_extra) == {"max_model_len"}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "Hi"})],
    ids=["chat", "text"],
)
async def test_usage_chunks_have_the_types_of_the_client(frontend: Any, path: str, body: Any) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, cached_tokens=1)
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"model": "demo", "stream": True, "stream_options": options, **body}
    answer = await frontend.http.post(path, json=asked)
    *events, done = answer.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    usages = [strictly(CompletionUsage, chunk["usage"]) for chunk in chunks]
    for usage in usages:
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.model_extra == {}
    assert chunks[-1]["choices"] == []
    assert usages[-1].prompt_tokens_details.cached_tokens == 1
    # The client's type of a text completion permits no null as the finish reason, which its server sends.
    checked = chunks[-1:] if path == "/v1/completions" else chunks
    kind = Completion if path == "/v1/completions" else ChatCompletionChunk
    assert all(strictly(kind, chunk).model_extra == {} for chunk in checked)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", {}, 400),
        ("POST", "/v1/completions", {"model": "no", "prompt": "x"}, 404),
        ("POST", "/v1/responses", {"model": "demo", "input": []}, 400),
        ("GET", "/v1/models/no", None, 404),
        ("GET", "/v1/no", None, 404),
        ("PUT", "/v1/models", None, 405),
    ],
)
async def test_errors_have_the_types_of_the_client(
    frontend: Any, method: str, path: str, body: Any, status: int
) -> None:
    answer = await frontend.http.request(method, path, json=body)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert strictly(ErrorObject, answer.json()["error"]).model_extra == {}


async def test_answers_a_chat(frontend: Any, demo_tokenizer: Tokenizer) -> None:
    frontend.worker.script = frontend.worker.says(TEXT, cached_tokens=3)
    answer = await frontend.client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "demo"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == TEXT
    assert choice.finish_reason == "stop"
    [request] = frontend.worker.requests
    assert answer.usage.prompt_tokens == len(request["token_ids"])
    assert answer.usage.completion_tokens == len(demo_tokenizer.encode(TEXT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert "Hi!" in demo_tokenizer.decode(request["token_ids"])


async def test_streams_a_chat(frontend: Any, demo_tokenizer: Tokenizer) -> None:
    stream = await frontend.client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    # A chunk a token, between the one with the role and the one with the reason: deltas are not merged.
    assert len(chunks) == len(demo_tokenizer.encode(TEXT)) + 2
    assert all(chunk.usage is None for chunk in chunks)


async def test_streams_usage_when_asked(frontend: Any, demo_tokenizer: Tokenizer) -> None:
    stream = await frontend.client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(demo_tokenizer.encode(TEXT))
    assert chunks[-1].usage.prompt_tokens == len(frontend.worker.requests[0]["token_ids"])


async def test_completes_text(frontend: Any) -> None:
    answer = await frontend.client.completions.create(model="demo", prompt="Once upon a time", max_tokens=64)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == TEXT
    stream = await frontend.client.completions.create(
        model="demo", prompt="Once", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage.total_tokens > 0


async def test_takes_prompts_in_every_form(frontend: Any, demo_tokenizer: Tokenizer) -> None:
    one, other = demo_tokenizer.encode("Once upon"), demo_tokenizer.encode("a time")
    prompts: list[Any] = ["Once upon", ["Once upon", "a time"], one, [one, other]]
    for prompt, wanted in zip(prompts, ([one], [one, other], [one], [one, other]), strict=True):
        frontend.worker.requests.clear()
        answer = await frontend.client.completions.create(model="demo", prompt=prompt, max_tokens=5)
        assert [request["token_ids"] for request in frontend.worker.requests] == wanted
        assert [choice.index for choice in answer.choices] == list(range(len(wanted)))
        assert answer.usage.prompt_tokens == sum(map(len, wanted))


async def test_streams_several_choices(frontend: Any) -> None:
    def by_prompt(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        text = f"answer to {frontend.worker.tokenizer.decode(request['token_ids'])}"
        return frontend.worker.says(text, pause_s=0.001)(request, context)  # type: ignore[no-any-return]

    frontend.worker.script = by_prompt
    stream = await frontend.client.completions.create(model="demo", prompt=["one", "two"], stream=True)
    texts = ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["answer to one", "answer to two"]


async def test_n_choices_have_different_seeds(frontend: Any) -> None:
    answer = await frontend.client.chat.completions.create(model="demo", messages=MESSAGES, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [request["sampling_options"]["seed"] for request in frontend.worker.requests] == [7, 8, 9]
    # The prompt counts once.
    assert answer.usage.prompt_tokens == len(frontend.worker.requests[0]["token_ids"])


async def test_passes_options_on(frontend: Any, demo_tokenizer: Tokenizer) -> None:
    await frontend.client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_completion_tokens=17,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=42,
        stop=["END"],
        logit_bias={"5": -100},
        response_format={"type": "json_object"},
        extra_body={"top_k": 5, "min_tokens": 2, "ignore_eos": True, "thinking_token_budget": 9},
    )
    [request] = frontend.worker.requests
    assert request["model"] == "demo"
    assert request["stop_conditions"] == {
        "max_tokens": 17,
        "min_tokens": 2,
        "ignore_eos": True,
        "max_thinking_tokens": 9,
        "stop": ["END"],
    }
    assert request["sampling_options"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "seed": 42,
        "logit_bias": {"5": -100.0},
        "guided_decoding": {"json": {"type": "object"}},
    }
    assert demo_tokenizer.token_id("<|im_end|>") in request["eos_token_ids"]
    await frontend.client.chat.completions.create(
        model="demo", messages=MESSAGES, extra_body={"nvext": {"ignore_eos": True}}
    )
    assert frontend.worker.requests[1]["stop_conditions"]["ignore_eos"] is True


async def test_limit_that_is_not_asked_for_is_left_to_the_engine(frontend: Any) -> None:
    await frontend.client.chat.completions.create(model="demo", messages=MESSAGES)
    [request] = frontend.worker.requests
    assert "max_tokens" not in request["stop_conditions"]


async def test_large_body_keeps_its_options(frontend: Any) -> None:
    """Another process parses it."""
    await frontend.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "word " * 20_000}],
        logit_bias={"5": 1},
        response_format={"type": "json_object"},
        extra_body={"nvext": {"greed_sampling": True}, "include_stop_str_in_output": True},
    )
    assert frontend.worker.requests[0]["sampling_options"] == {
        "temperature": 0.0,
        "logit_bias": {"5": 1.0},
        "include_stop_str_in_output": True,
        "guided_decoding": {"json": {"type": "object"}},
    }
    with pytest.raises(openai.BadRequestError) as caught:
        await frontend.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "word " * 20_000}],
            extra_body={"max_token": 5},
        )
    assert (caught.value.param, caught.value.code) == ("max_token", "unknown_parameter")


async def test_variables_of_any_name_reach_the_template(frontend: Any) -> None:
    names = ("self", "cls", "variables", "is_probe", "conversation", "environment", "a b", "")
    answer = await frontend.http.post(
        "/v1/chat/completions",
        json={"model": "demo", "messages": MESSAGES, "chat_template_kwargs": dict.fromkeys(names, 1)},
    )
    assert answer.status_code == 200, answer.text


async def test_tokens_beyond_the_vocabulary_are_refused(frontend: Any) -> None:
    for field, value in (("logit_bias", {"1000000": 1}), ("allowed_token_ids", [1, 1_000_000])):
        with pytest.raises(openai.BadRequestError) as caught:
            await frontend.client.chat.completions.create(
                model="demo", messages=MESSAGES, extra_body={field: value}
            )
        assert caught.value.param == field
    assert frontend.worker.requests == []


@pytest.mark.parametrize("field", ["include_stop_str_in_output", "no_stop_trim"])
async def test_stop_string_may_stay_in_the_answer(frontend: Any, field: str) -> None:
    answer = await frontend.client.chat.completions.create(
        model="demo", messages=MESSAGES, stop=["are y", "world"], extra_body={field: True}
    )
    assert answer.choices[0].message.content == "Hello, world"
    assert frontend.worker.requests[0]["sampling_options"]["include_stop_str_in_output"] is True


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_answer_and_the_work(frontend: Any, stream: bool) -> None:
    async def endless(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        async for item in frontend.worker.says("Hello, world! How are you?")(request, context):
            yield {"token_ids": item["token_ids"]}
        while True:
            await asyncio.sleep(0.001)
            yield {"token_ids": frontend.worker.tokenizer.encode(" on")}

    frontend.worker.script = endless
    answer = await frontend.client.chat.completions.create(
        model="demo", messages=MESSAGES, stop="are y", stream=stream
    )
    if stream:
        chunks = [chunk async for chunk in answer]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    assert text == "Hello, world! How "
    await frontend.until(lambda: frontend.worker.ended == ["closed"])
    assert frontend.worker.contexts[0].is_killed()


async def test_a_complete_answer_is_not_killed_at_the_worker(frontend: Any) -> None:
    await frontend.client.chat.completions.create(model="demo", messages=MESSAGES)
    stream = await frontend.client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    async for _ in stream:
        pass
    await frontend.until(lambda: len(frontend.worker.ended) == 2)
    assert frontend.worker.ended == ["complete", "complete"]


async def test_the_synchronous_client_works_too(frontend: Any) -> None:
    def use() -> str:
        with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(use) == TEXT


async def test_events_are_written_as_the_standard_says(frontend: Any) -> None:
    frontend.worker.script = frontend.worker.says("a\u2028b\x85c\r\nd")
    async with frontend.http.stream(
        "POST", "/v1/completions", json={"model": "demo", "prompt": "x", "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        content = await response.aread()
    events = content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert len(content.decode().splitlines()) == 2 * (len(events) - 1)


async def test_a_request_id_of_the_callers_reaches_the_worker(frontend: Any) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    response: httpx.Response = await frontend.http.post(
        "/v1/completions",
        json={"model": "demo", "prompt": "x"},
        headers={"x-request-id": "my-id-7", "traceparent": trace},
    )
    assert response.headers["x-request-id"] == "my-id-7"
    [context] = frontend.worker.contexts
    assert (context.id(), context.traceparent) == ("my-id-7", trace)
