"""Requests to the KServe server: by the official client, and message by message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from dynamo_redis.frontend.kserve import inference_pb2 as pb
from dynamo_redis.frontend.kserve.apis import SERVICE

Tensor = pb.ModelInferRequest.InferInputTensor


def text_tensor(text: bytes = b"Hello!", **changes: Any) -> Tensor:
    """Return the input tensor of a prompt, with changed fields."""
    contents = pb.InferTensorContents(bytes_contents=[text])
    return Tensor(
        **{"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": contents, **changes}
    )


def flag_tensor(value: bool = True, **changes: Any) -> Tensor:
    """Return the input tensor that asks for a stream, with changed fields."""
    fields = {"name": "streaming", "datatype": "BOOL", "shape": [1]}
    return Tensor(**{**fields, "contents": pb.InferTensorContents(bool_contents=[value]), **changes})


def infer_request(*inputs: Tensor, streaming: bool = False, **fields: Any) -> pb.ModelInferRequest:
    """Return a request to the model `demo`; without inputs, with a prompt and the wish for a stream."""
    given = inputs or ((text_tensor(), flag_tensor()) if streaming else (text_tensor(),))
    parameters = {name: parameter(value) for name, value in fields.pop("parameters", {}).items()}
    return pb.ModelInferRequest(
        **{"model_name": "demo", "inputs": list(given), "parameters": parameters, **fields}
    )


def parameter(value: object) -> pb.InferParameter:
    """Return a request parameter of the type of a value."""
    name = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
    fields: dict[str, Any] = {name: value}
    return pb.InferParameter(**fields)


class KserveClient:
    """A channel, and the calls that generate, on bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._infer: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        self.stream: Any = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")

    def infer(self, request: pb.ModelInferRequest | bytes, **options: Any) -> Any:
        """Begin ModelInfer."""
        content = request if isinstance(request, bytes) else request.SerializeToString()
        return self._infer(content, **options)

    async def answer(self, request: pb.ModelInferRequest | bytes, **options: Any) -> pb.ModelInferResponse:
        """Return the answer of ModelInfer."""
        return pb.ModelInferResponse.FromString(await self.infer(request, **options))


async def next_message(call: Any) -> pb.ModelStreamInferResponse | None:
    """Return the next message of a stream; None at its end."""
    content = await call.read()
    return None if content is grpc.aio.EOF else pb.ModelStreamInferResponse.FromString(content)


async def send(call: Any, request: pb.ModelInferRequest) -> None:
    """Send a request on a stream."""
    await call.write(request.SerializeToString())


async def until_final(call: Any) -> tuple[list[str], str]:
    """Return the texts of an answer on a stream, and its finish reason."""
    texts = []
    while (message := await next_message(call)) is not None:
        assert not message.error_message, message.error_message
        text, reason = message.infer_response.outputs
        texts.append(text.contents.bytes_contents[0].decode())
        if message.infer_response.parameters["triton_final_response"].bool_param:
            return texts, reason.contents.bytes_contents[0].decode()
        assert reason.contents.bytes_contents[0] == b""
    raise AssertionError(f"the stream ended behind {texts}")


@asynccontextmanager
async def kserve_client(port: int, **options: int) -> AsyncIterator[KserveClient]:
    """Yield a client of a port of this machine."""
    channel = grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1), *options.items()]
    )
    async with channel:
        yield KserveClient(channel)
