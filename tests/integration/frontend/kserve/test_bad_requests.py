"""Requests that the KServe server refuses: each by a status code, and a text that names the fault."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from dynamo_redis.errors import ConnectionLost, Overloaded
from dynamo_redis.frontend.kserve import inference_pb2 as pb
from tests.integration.frontend.conftest import Frontend, OpenFrontend, Script
from tests.kserve_client import (
    KserveClient,
    flag_tensor,
    infer_request,
    kserve_client,
    next_message,
    parameter,
    send,
    text_tensor,
    until_final,
)

LIMIT_BYTES = 256 << 10
INVALID = grpc.StatusCode.INVALID_ARGUMENT
Contents = pb.InferTensorContents

BAD: dict[str, tuple[pb.ModelInferRequest | bytes, str]] = {
    "rubbish": (b"\xff\xff\xff\xff", "not a ModelInferRequest"),
    "no inputs": (pb.ModelInferRequest(model_name="demo"), "Missing required input: 'text_input'"),
    "unknown input": (infer_request(text_tensor(name="prompt")), "Unknown input: 'prompt'"),
    "two prompts": (infer_request(text_tensor(), text_tensor()), "'text_input' is there twice"),
    "two flags": (infer_request(text_tensor(), flag_tensor(), flag_tensor(name="stream")), "give it once"),
    "batch": (infer_request(text_tensor(shape=[2])), "shape [2]"),
    "no shape": (infer_request(text_tensor(shape=[])), "shape []"),
    "datatype": (infer_request(text_tensor(datatype="FP32")), "'FP32' and must have 'BYTES'"),
    "flag datatype": (infer_request(text_tensor(), flag_tensor(datatype="BYTES")), "must have 'BOOL'"),
    "no element": (infer_request(text_tensor(contents=Contents())), "has 0 elements"),
    "two elements": (
        infer_request(text_tensor(contents=Contents(bytes_contents=[b"a", b"b"]))),
        "2 elements",
    ),
    "wrong contents": (
        infer_request(text_tensor(contents=Contents(int_contents=[1], bytes_contents=[b"a"]))),
        "'int_contents'",
    ),
    "not UTF-8": (infer_request(text_tensor(b"\xff")), "not valid UTF-8"),
    "lone surrogate": (infer_request(text_tensor(b"\xed\xa0\x80")), "not valid UTF-8"),
    "contents twice": (infer_request(text_tensor(), raw_input_contents=[b"\1\0\0\0a"]), "contents twice"),
    "too few raw": (
        infer_request(
            text_tensor(contents=None), flag_tensor(contents=None), raw_input_contents=[b"\1\0\0\0a"]
        ),
        "1 'raw_input_contents' for 2 inputs",
    ),
    "raw too short": (
        infer_request(text_tensor(contents=None), raw_input_contents=[b"a"]),
        "not one element",
    ),
    "raw length": (
        infer_request(text_tensor(contents=None), raw_input_contents=[b"\xff\0\0\0a"]),
        "not one element",
    ),
    "raw flag": (
        infer_request(
            text_tensor(contents=None),
            flag_tensor(contents=None),
            raw_input_contents=[b"\1\0\0\0a", b"\2"],
        ),
        "not one byte",
    ),
    "tensor parameter": (
        infer_request(text_tensor(parameters={"shared_memory_region": parameter("x")})),
        "text_input.shared_memory_region",
    ),
    "many inputs": (infer_request(*[text_tensor(b"")] * 3000), "All of the request but"),
    "large parameter": (infer_request(parameters={"bad_words": "[" * 70_000}), "All of the request but"),
    "cut": (infer_request().SerializeToString()[:-1], "not a ModelInferRequest"),
    "unknown output": (
        infer_request(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")]),
        "Unknown output: 'logits'",
    ),
    "output parameter": (
        infer_request(
            outputs=[
                pb.ModelInferRequest.InferRequestedOutputTensor(
                    name="text_output", parameters={"classification": parameter(3)}
                )
            ]
        ),
        "text_output.classification",
    ),
    "unknown parameter": (infer_request(parameters={"max_tokenz": 1}), "Did you mean 'max_tokens'?"),
    "parameter of the request": (infer_request(parameters={"prompt": "x"}), "'prompt'"),
    "Triton's parameter": (infer_request(parameters={"sequence_id": 7}), "'sequence_id'"),
    "no value": (
        pb.ModelInferRequest(
            model_name="demo", inputs=[text_tensor()], parameters={"seed": pb.InferParameter()}
        ),
        "'seed' has no value",
    ),
    "wrong type": (infer_request(parameters={"max_tokens": "four"}), "'max_tokens'"),
    "out of range": (infer_request(parameters={"max_tokens": -1}), "'max_tokens'"),
    "not a number": (infer_request(parameters={"temperature": math.nan}), "not a finite number"),
    "not JSON": (infer_request(parameters={"logit_bias": "{"}), "not JSON"),
    "logprobs": (infer_request(parameters={"logprobs": 1}), "'logprobs'"),
    "too long": (infer_request(parameters={"max_tokens": 10**9}), "maximum context length"),
    "empty prompt": (infer_request(text_tensor(b"")), "prompt is empty"),
}


@pytest.fixture
async def frontend(open_frontend: OpenFrontend) -> Frontend:
    return await open_frontend(kserve_grpc_server=True, grpc_port=0, max_body_bytes=LIMIT_BYTES)


@pytest.fixture
async def client(frontend: Frontend) -> AsyncIterator[KserveClient]:
    async with kserve_client(frontend.grpc_port) as client:
        yield client


async def refused(client: KserveClient, request: pb.ModelInferRequest | bytes) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.infer(request)
    return caught.value.code(), caught.value.details() or ""


async def test_bad_requests_are_invalid_arguments(frontend: Frontend, client: KserveClient) -> None:
    for name, (request, fault) in BAD.items():
        status, text = await refused(client, request)
        assert (status, fault in text) == (INVALID, True), (name, status, text)
    assert not frontend.worker.requests
    assert (await client.answer(infer_request())).outputs[1].contents.bytes_contents == [b"stop"]


async def test_stream_goes_on_behind_a_bad_request(client: KserveClient) -> None:
    call = client.stream()
    for name, (request, fault) in BAD.items():
        await call.write(request if isinstance(request, bytes) else request.SerializeToString())
        message = await next_message(call)
        assert message is not None
        assert message.error_message.startswith("INVALID_ARGUMENT: "), name
        assert fault in message.error_message, name
    await send(call, infer_request(streaming=True, parameters={"n": 2}, id="two"))
    message = await next_message(call)
    assert message is not None
    assert (message.infer_response.id, "'n'" in message.error_message) == ("two", True)
    await send(call, infer_request(streaming=True))
    assert (await until_final(call))[1] == "stop"
    await call.done_writing()
    assert await next_message(call) is None
    assert await call.code() is grpc.StatusCode.OK


async def test_infer_refuses_to_stream(client: KserveClient) -> None:
    status, text = await refused(client, infer_request(streaming=True))
    assert (status, "ModelStreamInfer" in text) == (INVALID, True)


async def test_unknown_model_and_version_are_not_found(client: KserveClient) -> None:
    for request in (infer_request(model_name="unknown"), infer_request(model_version="2")):
        assert (await refused(client, request))[0] is grpc.StatusCode.NOT_FOUND


async def test_unknown_call_is_unimplemented(client: KserveClient) -> None:
    call: Any = client.channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_large_messages_are_refused(client: KserveClient) -> None:
    status, text = await refused(client, infer_request(text_tensor(b"a" * LIMIT_BYTES)))
    assert (status, "larger than max" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert (await client.answer(infer_request())).model_name == "demo"


async def test_compressed_messages_are_refused(client: KserveClient) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="disabled") as caught:
        await client.infer(infer_request(text_tensor(b"a" * 1000)), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_large_text_is_read(open_frontend: OpenFrontend) -> None:
    frontend = await open_frontend(kserve_grpc_server=True, grpc_port=0)
    large = infer_request(text_tensor(b"a" * (2 << 20)))
    raw = infer_request(
        text_tensor(contents=None), raw_input_contents=[(2 << 20).to_bytes(4, "little") + b"a" * (2 << 20)]
    )
    async with kserve_client(frontend.grpc_port) as client:
        for request in (large, raw):
            status, text = await refused(client, request)
            assert (status, "maximum context length" in text) == (INVALID, True)


async def test_worker_errors_have_their_status(frontend: Frontend, client: KserveClient) -> None:
    def failing(error: Exception) -> Script:
        async def script(*_: object) -> AsyncGenerator[Any]:
            for failure in (error,):
                raise failure
            yield {}

        return script

    for error, status in (
        (Overloaded("the worker has no room"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ConnectionLost("10.0.0.7:1 is gone"), grpc.StatusCode.UNAVAILABLE),
    ):
        frontend.worker.script = failing(error)
        code, text = await refused(client, infer_request())
        assert code is status
        assert "10.0.0.7" not in text
    frontend.worker.ids = []
    assert (await refused(client, infer_request()))[0] is grpc.StatusCode.UNAVAILABLE


async def test_stream_tells_of_an_answer_that_broke_off(frontend: Frontend, client: KserveClient) -> None:
    async def breaks(*_: object) -> AsyncGenerator[Any]:
        yield {"token_ids": [40]}
        raise ConnectionLost("10.0.0.7:1 is gone")

    frontend.worker.script = breaks
    call = client.stream()
    await send(call, infer_request(streaming=True, id="broken"))
    first, second = await next_message(call), await next_message(call)
    assert first is not None
    assert second is not None
    assert not first.error_message
    assert second.error_message.startswith("UNAVAILABLE: the worker was lost while answering")
    assert second.infer_response.id == "broken"
    frontend.worker.script = frontend.worker.says("Hi")
    await send(call, infer_request(streaming=True))
    assert "".join((await until_final(call))[0]) == "Hi"
    call.cancel()
