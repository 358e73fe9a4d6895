"""The KServe server as the official client, tritonclient, sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from dynamo_redis.frontend.kserve.apis import SERVICE
from tests.integration.frontend.conftest import Frontend, OpenFrontend
from tests.kserve_client import infer_request, kserve_client

TEXT = "Hello, world! How are you?"


@pytest.fixture
async def frontend(open_frontend: OpenFrontend) -> Frontend:
    return await open_frontend(kserve_grpc_server=True, grpc_port=0)


@pytest.fixture
async def client(frontend: Frontend) -> AsyncIterator[Any]:
    async with InferenceServerClient(f"127.0.0.1:{frontend.grpc_port}") as client:
        yield client


def inputs(text: str = "Hello!", *, streaming: bool | None = None) -> list[Any]:
    prompt = InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    if streaming is None:
        return [prompt]
    flag = InferInput("streaming", [1], "BOOL")
    flag.set_data_from_numpy(np.array([streaming]))
    return [prompt, flag]


def text_of(result: Any) -> str:
    [text] = result.as_numpy("text_output")
    return str(text, "utf-8")


async def test_health_calls_tell_what_is_served(frontend: Frontend, client: Any) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("demo")
    assert await client.is_model_ready("demo", "1")
    assert not await client.is_model_ready("unknown")
    assert not await client.is_model_ready("demo", "2")
    frontend.worker.ids = []
    frontend.runtime.registry.delete("v1/mdc/dynamo/backend/generate/1")
    assert await client.is_server_live()


async def test_metadata_describe_the_tensors(client: Any) -> None:
    metadata = await client.get_model_metadata("demo", as_json=True)
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["text_input", "streaming"]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["text_output", "finish_reason"]
    assert (metadata["versions"], metadata["platform"]) == (["1"], "dynamo")
    config = (await client.get_model_config("demo", as_json=True))["config"]
    assert config["input"][1] == {
        "name": "streaming",
        "data_type": "TYPE_BOOL",
        "dims": ["1"],
        "optional": True,
    }
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert (await client.get_server_metadata()).name == "dynamo-redis"
    with pytest.raises(InferenceServerException, match="does not exist") as caught:
        await client.get_model_metadata("unknown")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


async def test_infer_answers_whole(frontend: Frontend, client: Any) -> None:
    parameters = {"max_tokens": 40, "temperature": 0.5, "ignore_eos": True, "stop": "never"}
    result = await client.infer("demo", inputs(streaming=False), request_id="one", parameters=parameters)
    assert text_of(result) == TEXT
    assert list(result.as_numpy("finish_reason")) == [b"stop"]
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("one", "demo", "1")
    [request] = frontend.worker.requests
    assert request["stop_conditions"] == {"max_tokens": 40, "ignore_eos": True, "stop": ["never"]}
    assert request["sampling_options"] == {"temperature": 0.5}
    assert request["token_ids"] == frontend.worker.tokenizer.encode("Hello!", add_special_tokens=True)


async def test_echo_puts_the_prompt_before_the_answer(client: Any) -> None:
    result = await client.infer("demo", inputs("Say hi. "), parameters={"echo": True})
    assert text_of(result) == "Say hi. " + TEXT

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": "demo",
            "inputs": inputs("Say hi. ", streaming=True),
            "parameters": {"echo": True},
        }

    pieces = [text_of(result) async for result, _ in client.stream_infer(requests())]
    assert "".join(pieces) == "Say hi. " + TEXT


async def test_infer_returns_the_wanted_outputs(client: Any) -> None:
    wanted = [InferRequestedOutput("finish_reason")]
    result = await client.infer("demo", inputs(), outputs=wanted, parameters={"n": 2})
    assert list(result.as_numpy("finish_reason")) == [b"stop", b"stop"]
    assert result.as_numpy("text_output") is None


async def test_stream_answers_requests_in_order(client: Any) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for name, model, streaming in (
            ("a", "demo", True),
            ("b", "unknown", True),
            ("c", "demo", False),
            ("d", "demo", True),
        ):
            yield {"model_name": model, "inputs": inputs(streaming=streaming), "request_id": name}

    texts: dict[str, list[str]] = {}
    final, errors = [], []
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            errors.append(error.message())
            continue
        response = result.get_response()
        texts.setdefault(response.id, []).append(text_of(result))
        if response.parameters["triton_final_response"].bool_param:
            final.append((response.id, bytes(result.as_numpy("finish_reason")[0])))
    assert {name: "".join(pieces) for name, pieces in texts.items()} == {"a": TEXT, "c": TEXT, "d": TEXT}
    assert len(texts["a"]) > 3
    assert len(texts["c"]) == 1
    assert final == [("a", b"stop"), ("c", b"stop"), ("d", b"stop")]
    assert len(errors) == 1
    assert errors[0].startswith("NOT_FOUND: The model `unknown`")


async def test_stream_may_end_with_a_status(client: Any) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "unknown", "inputs": inputs(streaming=True)}

    stream = client.stream_infer(requests(), headers={"triton_grpc_error": "true"})
    with pytest.raises(grpc.aio.AioRpcError, match="does not exist") as caught:
        await anext(stream)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_calls_but_those_of_health_need_a_key(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(kserve_grpc_server=True, grpc_port=0, http_api_key="sk-right")
    right = {"authorization": "Bearer sk-right"}
    right_too = {"x-api-key": "sk-right"}
    async with InferenceServerClient(f"127.0.0.1:{frontend.grpc_port}") as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("demo")
        calls: list[Callable[..., Any]] = [
            partial(client.infer, "demo", inputs()),
            partial(client.get_model_metadata, "demo"),
            partial(client.get_model_config, "demo"),
            client.get_server_metadata,
        ]
        for call in calls:
            for headers in (None, {"authorization": "Bearer sk-wrong"}):
                with pytest.raises(InferenceServerException, match="API key") as caught:
                    await call(headers=headers)
                assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
            await call(headers=right)
            await call(headers=right_too)


async def test_message_without_a_key_is_not_received(open_frontend: OpenFrontend) -> None:
    """Calls end before their message has come."""
    frontend = await open_frontend(kserve_grpc_server=True, grpc_port=0, http_api_key="sk-right")
    async with kserve_client(frontend.grpc_port) as client, asyncio.timeout(30):
        for method in ("ModelInfer", "ServerMetadata", "ModelMetadata", "ModelConfig"):
            call: Any = client.channel.stream_stream(f"/{SERVICE}/{method}")()
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_streams_without_a_key_take_no_place(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(
        kserve_grpc_server=True, grpc_port=0, http_api_key="sk-right", max_http_connections_count=2
    )
    async with kserve_client(frontend.grpc_port) as client, asyncio.timeout(30):
        for _ in range(3):
            stream = client.stream()  # sends no request
            assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED
        for right in (("authorization", "Bearer sk-right"), ("x-api-key", "sk-right")):
            assert (await client.answer(infer_request(), metadata=(right,))).outputs
