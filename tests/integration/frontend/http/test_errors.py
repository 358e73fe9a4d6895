"""Failures of requests, as a client sees them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest

from dynamo_redis import errors
from dynamo_redis.frontend import exchange
from dynamo_redis.frontend.http.errors import worker_lost
from dynamo_redis.frontend.prompts import PROBE_CHARS
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.rate_limited_log import RateLimitedLog

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi!"}]
BODY = {"model": "demo", "messages": MESSAGES}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, and check that it has OpenAI's form."""
    assert response.headers["content-type"].startswith("application/json")
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


# --------------------------------------------------------------------------- the request is wrong


async def test_a_wrong_value_is_named(frontend: Any) -> None:
    """The bodies' own checks are tested in `tests/unit/frontend/test_openai.py`."""
    changes: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "alien", "content": "Hi"}]}, "messages[0].role"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ]
    for change, param in changes:
        response = await frontend.http.post(CHAT, json={**BODY, **change})
        assert response.status_code == 400
        error = error_of(response)
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
    prompts: list[Any] = ["", [10**6], [], [[]]]
    for prompt in prompts:
        response = await frontend.http.post("/v1/completions", json={"model": "demo", "prompt": prompt})
        assert response.status_code == 400
        assert error_of(response)["param"].startswith("prompt")
    assert frontend.worker.requests == []


async def test_invalid_json_is_refused(frontend: Any) -> None:
    contents = (
        b"",
        b"[]",
        b'{"model": "demo", "messages": [{"role": "user", "content": "\xff"}]}',
        b"\x00\x01",
    )
    for content in contents:
        response = await frontend.http.post(CHAT, content=content)
        assert response.status_code == 400
        assert error_of(response)["type"] == "invalid_request_error"


async def test_a_prompt_longer_than_the_context_is_refused(frontend: Any) -> None:
    context_length = frontend.models.get("demo").loaded.context_length
    with pytest.raises(openai.BadRequestError) as caught:
        await frontend.client.completions.create(model="demo", prompt=[5] * context_length)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    assert str(context_length) in caught.value.message
    # One less, and one token can be generated.
    await frontend.client.completions.create(model="demo", prompt=[5] * (context_length - 1))
    assert len(frontend.worker.requests) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        await frontend.client.completions.create(
            model="demo", prompt=[5] * (context_length - 1), max_tokens=2
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


async def test_text_far_over_context_is_refused_early(frontend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = frontend.models.get("demo").loaded
    encode = model.tokenizer.encode
    sizes: list[int] = []

    def counting(_: object, text: str, **options: Any) -> list[int]:
        sizes.append(len(text))
        token_ids: list[int] = encode(text, **options)
        return token_ids

    monkeypatch.setattr(type(model.tokenizer), "encode", counting)
    with pytest.raises(openai.BadRequestError) as caught:
        await frontend.client.completions.create(model="demo", prompt="word " * 4_000_000)
    assert caught.value.code == "context_length_exceeded"
    assert "at least" in caught.value.message
    assert sizes == [PROBE_CHARS * model.context_length]


async def test_an_unknown_model_is_not_found(frontend: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await frontend.client.chat.completions.create(model="unknown", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        await frontend.client.models.retrieve("no/body")


async def test_unknown_paths_and_methods(frontend: Any) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/images/generations", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ):
        response = await frontend.http.request(method, path)
        assert response.status_code == status
        error_of(response)


async def test_unknown_path_lists_known_ones(frontend: Any) -> None:
    message = error_of(await frontend.http.post("/chat/completions"))["message"]
    assert "POST /v1/chat/completions" in message
    assert "GET /v1/models/{model}" in message
    wrong_method = error_of(await frontend.http.get(CHAT))["message"]
    assert wrong_method.endswith("it takes POST.")


# --------------------------------------------------------------------------- the body is too large


async def test_a_body_over_the_limit_is_refused_without_being_held(open_frontend: Any) -> None:
    frontend = await open_frontend(max_body_bytes="64KiB")
    large = json.dumps({**BODY, "messages": [{"role": "user", "content": "x" * (1 << 20)}]}).encode()
    response = await frontend.http.post(CHAT, content=large)
    assert response.status_code == 413
    assert "65536" in error_of(response)["message"]

    async def chunked() -> AsyncGenerator[bytes]:
        for start in range(0, len(large), 8192):
            yield large[start : start + 8192]

    response = await frontend.http.post(CHAT, content=chunked())
    assert response.status_code == 413
    # The connection is as good as before.
    assert (await frontend.http.post(CHAT, json=BODY)).status_code == 200


@pytest.mark.parametrize(
    "announced", [f"{50 << 20}\r\nExpect: 100-continue", f"{1 << 40}"], ids=["asked first", "without end"]
)
async def test_large_body_is_refused_by_its_announced_length(open_frontend: Any, announced: str) -> None:
    frontend = await open_frontend(max_body_bytes="64KiB")
    host, port = frontend.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {announced}\r\n\r\n".encode())
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_fifty_megabytes_are_not_buffered(frontend: Any) -> None:
    import psutil

    process = psutil.Process()

    async def chunked() -> AsyncGenerator[bytes]:
        piece = b"x" * (256 * 1024)
        for _ in range(4 * 50):
            yield piece

    before = process.memory_info().rss
    highest = 0

    async def sample() -> None:
        nonlocal highest
        while True:
            highest = max(highest, process.memory_info().rss)
            await asyncio.sleep(0.002)

    sampling = asyncio.create_task(sample())
    response = await frontend.http.post(CHAT, content=chunked())
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)
    assert response.status_code == 413
    assert highest - before < 90 << 20  # the limit of 45 MiB, once more while it is compared, and slack


# --------------------------------------------------------------------------- the worker fails


def fails(error: Exception, after: int = 0) -> Any:
    """Return a script that raises after some tokens."""

    async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        for _ in range(after):
            yield {"token_ids": [40]}
        raise error

    return script


async def test_an_error_before_the_first_item_is_an_http_error(frontend: Any) -> None:
    failures: list[tuple[errors.PlaneError, int]] = [
        (errors.NoInstances("none"), 503),
        (errors.Overloaded("full", retry_after_s=2.5), 503),
        (errors.Draining("leaving"), 503),
        (errors.CannotConnect("refused"), 503),
        (errors.ConnectionLost("reset"), 503),
        (errors.InstanceRemoved("gone"), 503),
        (errors.DeadlineExceeded("too late"), 504),
        (errors.InvalidRequest("no such LoRA"), 400),
        (errors.PayloadTooLarge(size_bytes=9, limit_bytes=8), 413),
        (errors.HandlerFailed("ValueError: boom"), 502),
        (errors.ProtocolViolation("what?"), 502),
    ]
    for error, status in failures:
        frontend.worker.script = fails(error)
        for stream in (False, True):
            response = await frontend.http.post(CHAT, json={**BODY, "stream": stream})
            assert response.status_code == status
            body = error_of(response)
            assert body["code"] == error.code
            unreachable = worker_lost(error)
            assert ("no worker of model `demo` can be reached" if unreachable else str(error)) in body[
                "message"
            ]
            if isinstance(error, errors.Overloaded):
                assert response.headers["retry-after"] == "3"


def plane_errors(kind: type[errors.PlaneError]) -> list[type[errors.PlaneError]]:
    """Return a class of errors and all its subclasses."""
    return [kind, *(below for child in kind.__subclasses__() for below in plane_errors(child))]


@pytest.mark.parametrize("kind", plane_errors(errors.PlaneError))
async def test_no_error_makes_a_part_look_whole(frontend: Any, kind: type[errors.PlaneError]) -> None:
    frontend.worker.script = fails(kind("broken"), after=3)
    whole = await frontend.http.post(CHAT, json=BODY)
    assert whole.status_code >= 400
    code = "rate_limit_exceeded" if kind is errors.RateLimited else kind.code
    assert error_of(whole)["code"] == code
    streamed = await frontend.http.post(CHAT, json={**BODY, "stream": True})
    *_, last = streamed.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code


@pytest.mark.parametrize("stream", [False, True])
async def test_failing_error_report_ends_no_answer_well(
    frontend: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(exchange, "worker_error", fail)
    frontend.worker.script = fails(errors.ConnectionLost("the worker is gone"), after=3)
    response = await frontend.http.post(CHAT, json={**BODY, "stream": stream})
    *_, last = response.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal"


async def test_no_workers_is_unavailable(frontend: Any) -> None:
    frontend.worker.ids = []
    with pytest.raises(openai.InternalServerError) as caught:
        await frontend.client.chat.completions.create(model="demo", messages=MESSAGES)
    assert caught.value.status_code == 503
    assert caught.value.code == "no_instances"


async def test_an_error_amid_a_stream_is_an_event(frontend: Any) -> None:
    frontend.worker.script = fails(errors.ConnectionLost("the worker is gone"), after=3)
    stream = await frontend.client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    chunks = []

    async def read() -> None:
        async for chunk in stream:
            chunks.append(chunk)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(openai.APIError, match="the worker was lost while answering"):
        await read()
    assert len(chunks) >= 3
    response = await frontend.http.post(CHAT, json={**BODY, "stream": True})
    *_, last = response.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "connection_lost"


async def test_an_error_amid_a_whole_answer_is_an_http_error(frontend: Any) -> None:
    frontend.worker.script = fails(errors.ConnectionLost("the worker is gone"), after=3)
    with pytest.raises(openai.InternalServerError) as caught:
        await frontend.client.chat.completions.create(model="demo", messages=MESSAGES)
    assert caught.value.status_code == 502


async def test_one_choice_that_fails_ends_the_others(frontend: Any) -> None:
    async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        if request["sampling_options"]["seed"] == 1:
            raise errors.ConnectionLost("gone")
        while True:
            await asyncio.sleep(0.001)
            yield {"token_ids": [40]}

    frontend.worker.script = script
    response = await frontend.http.post(CHAT, json={**BODY, "n": 2, "seed": 0, "stream": False})
    assert response.status_code == 503
    await frontend.until(lambda: len(frontend.worker.ended) == 2)


async def test_a_worker_that_answers_nonsense_is_an_error(frontend: Any) -> None:
    for item in (
        "text",
        {},
        {"token_ids": 5},
        {"token_ids": ["x"]},
        {"token_ids": [5], "finish_reason": "error"},
        {"token_ids": [5], "finish_reason": ["stop"]},
    ):

        async def script(request: GenerateRequest, context: Context, item: Any = item) -> AsyncGenerator[Any]:
            yield item

        frontend.worker.script = script
        response = await frontend.http.post(CHAT, json=BODY)
        assert response.status_code in (500, 502)
        error_of(response)


def answers(*items: Any) -> Any:
    """Return a script that answers with these items."""

    async def script(request: GenerateRequest, context: Context) -> AsyncGenerator[Any]:
        for item in items:
            yield item

    return script


@pytest.mark.parametrize("token_ids", [5, "abc", ["a"], [[1]], [None]])
async def test_wrong_token_ids_are_the_workers_fault(frontend: Any, token_ids: Any) -> None:
    frontend.worker.script = answers({"token_ids": token_ids, "finish_reason": "stop"})
    for stream in (False, True):
        response = await frontend.http.post(CHAT, json={**BODY, "stream": stream})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (502, "protocol_violation")
        assert "'token_ids'" in error["message"]


@pytest.mark.parametrize("count", ["x", [1], -5, 1.5, True, None])
async def test_answer_survives_a_wrong_count(frontend: Any, count: Any) -> None:
    frontend.worker.script = answers({"token_ids": [40], "finish_reason": "stop", "cached_tokens": count})
    whole = await frontend.http.post(CHAT, json=BODY)
    assert "prompt_tokens_details" not in whole.json()["usage"]
    streamed = await frontend.http.post(
        CHAT, json={**BODY, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert "prompt_tokens_details" not in streamed.text


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        (
            fails(errors.EngineFailed("the engine answered 500")),
            "failed at its worker: the engine answered 500",
        ),
        (answers("text"), "failed at its worker: the worker answered with str"),
        (answers({"token_ids": [40]}), "lost its worker: .* no finish_reason"),
    ],
)
async def test_failure_at_a_worker_is_logged(
    frontend: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch, script: Any, detail: str
) -> None:
    monkeypatch.setattr(exchange, "_failures", RateLimitedLog(exchange.log))
    frontend.worker.script = script
    error_of(await frontend.http.post(CHAT, json=BODY))
    assert [record.levelname for record in caplog.records if re.search(detail, record.message)] == ["WARNING"]


async def test_a_chat_template_that_raises_is_the_callers_error(frontend: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await frontend.client.chat.completions.create(
            model="demo",
            messages=[*MESSAGES, {"role": "assistant", "content": ""}],
            extra_body={"continue_final_message": True},
        )
    assert caught.value.code == "template"
    assert "no text to continue" in caught.value.message


async def test_messages_that_make_no_prompt_are_the_callers_error(
    frontend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = frontend.models.get("demo").loaded.template

    async def nothing(*_: object) -> bytes:
        return b""

    monkeypatch.setattr(type(template), "render", nothing)
    response = await frontend.http.post(CHAT, json=BODY)
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages"
    assert frontend.worker.requests == []


async def test_an_error_has_one_content_type(frontend: Any) -> None:
    frontend.worker.script = fails(errors.HandlerFailed("boom"))
    for path, body in ((CHAT, {}), (CHAT, BODY), ("/nowhere", {})):
        response = await frontend.http.post(path, json=body)
        assert response.status_code >= 400
        assert response.headers.get_list("content-type") == ["application/json"]


async def test_a_lost_worker_is_told_without_its_address(
    frontend: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    detail = "cannot connect to 127.0.0.1:46579: [Errno 111]"
    for after, status, words in (
        (0, 503, "no worker of model `demo` can be reached"),
        (2, 502, "incomplete"),
    ):
        monkeypatch.setattr(exchange, "_failures", RateLimitedLog(exchange.log))
        caplog.clear()
        frontend.worker.script = fails(errors.ConnectionLost(detail), after=after)
        response = await frontend.http.post(CHAT, json=BODY)
        assert response.status_code == status
        assert words in error_of(response)["message"]
        assert response.headers.get("retry-after") == ("1" if status == 503 else None)
        streamed = await frontend.http.post(CHAT, json={**BODY, "stream": True})
        assert words in streamed.text
        assert "127.0.0.1" not in response.text + streamed.text
        lines = [record.levelname for record in caplog.records if detail in record.message]
        assert lines.count("WARNING") == 1


async def test_defect_is_a_500_in_the_form_of_the_api(frontend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(frontend.models, "get", fail)
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
    response = await frontend.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "Internal error: RuntimeError.",
        "type": "server_error",
        "param": None,
        "code": "internal",
    }
