"""From a ModelInferRequest to the body of a text completion. Pure.

Everything that a request says is served or refused by name: the tensors as in Dynamo (`text_input`, and
`streaming` or `stream`), the request parameters as the fields of `/v1/completions`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError
from pydantic import PrivateAttr

from dynamo_redis.frontend.http.bodies import Body
from dynamo_redis.frontend.http.body_reader import INLINE_BYTES
from dynamo_redis.frontend.http.errors import ApiError, invalid
from dynamo_redis.frontend.kserve.inference_pb2 import InferParameter, ModelInferRequest
from dynamo_redis.frontend.kserve.wire_size import BrokenMessage, check_size
from dynamo_redis.frontend.openai import TextBody, read_body
from dynamo_redis.frontend.parameters import unsupported

TEXT_INPUT: Final = "text_input"
STREAM_INPUTS: Final = ("streaming", "stream")
OUTPUTS: Final = ("text_output", "finish_reason")
VERSION: Final = "1"
"""The version of each model."""

FINAL_FLAG: Final = "triton_enable_empty_final_response"
"""Triton's parameter that asks for a mark on the last response, which each stream has here in any case."""

_JSON: Final = frozenset(
    (
        "allowed_token_ids",
        "bad_words",
        "guided_choice",
        "guided_json",
        "json_schema",
        "logit_bias",
        "nvext",
        "response_format",
        "stop_token_ids",
        "structured_outputs",
    )
)
"""Parameters with a value that is no scalar: a string parameter holds its JSON."""

_REFUSED: Final[Mapping[str, str]] = {
    "model": "the request has 'model_name'",
    "prompt": f"the prompt is the input tensor '{TEXT_INPUT}'",
    "stream": "give it as the input tensor 'streaming'",
    "stream_options": "no output tensor has counts of tokens",
    "logprobs": "no output tensor has log probabilities",
    "top_logprobs": "no output tensor has log probabilities",
    "prompt_logprobs": "no output tensor has log probabilities",
    "return_token_ids": "answers are text",
    "return_tokens_as_token_ids": "answers are text",
    "timeout": "the deadline of the gRPC call is the request's",
    "sequence_id": "requests are of no sequence",
    "sequence_start": "requests are of no sequence",
    "sequence_end": "requests are of no sequence",
}


class KserveBody(TextBody):
    """A text completion that was asked for over gRPC."""

    _request_id: str = PrivateAttr(default="")
    _outputs: tuple[str, ...] = PrivateAttr(default=OUTPUTS)
    _is_raw: bool = PrivateAttr(default=False)

    @property
    def request_id(self) -> str:
        """The id that the client has given the request, or an empty string."""
        return self._request_id

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the output tensors that the client asks for."""
        return self._outputs

    @property
    def is_raw(self) -> bool:
        """True if the inputs came as raw contents: the outputs then go in the same way."""
        return self._is_raw


async def read_request(content: list[bytearray], *, may_stream: bool) -> Body:
    """Check a serialized ModelInferRequest, given in pieces. Return its body. Raises ApiError.

    `may_stream`: the call takes more than one response. A large message is parsed in a thread.
    """
    message = b"".join(content)
    content.clear()
    try:
        check_size(memoryview(message))
        if len(message) <= INLINE_BYTES:
            return _read(message, may_stream=may_stream)
        return await asyncio.to_thread(_read, message, may_stream=may_stream)
    except (BrokenMessage, DecodeError) as exc:
        raise invalid("The message is not a ModelInferRequest.") from exc


def _read(message: bytes, *, may_stream: bool) -> Body:
    request = ModelInferRequest.FromString(message)
    if request.model_version not in ("", VERSION):
        raise ApiError(
            404,
            f"Model version {_shown(request.model_version)} does not exist: models have version {VERSION!r}.",
            param="model_version",
            code="model_not_found",
        )
    text, is_stream = _read_inputs(request)
    if is_stream and not may_stream:
        raise invalid("ModelInfer answers once: ask for a stream by ModelStreamInfer.", "streaming")
    fields = {"model": request.model_name, "prompt": "", "stream": is_stream}
    body = read_body(KserveBody, json.dumps(fields | _read_parameters(request.parameters)).encode())
    if is_stream and (body.n or 1) > 1:
        raise unsupported("n", "responses of a stream do not tell which answer they belong to")
    body.prompt = text
    body._request_id = request.id
    body._outputs = _read_outputs(request)
    body._is_raw = bool(request.raw_input_contents)
    return Body(body, [text])


# --------------------------------------------------------------------------- tensors


def _read_inputs(request: ModelInferRequest) -> tuple[str, bool]:
    """Return the prompt, and whether the answer is to be streamed."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(
            f"There are {len(raw)} 'raw_input_contents' for {len(request.inputs)} inputs: give the content "
            "of each input there, or of none."
        )
    text: str | None = None
    stream: bool | None = None
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name != TEXT_INPUT and name not in STREAM_INPUTS:
            raise invalid(
                f"Unknown input: {_shown(name)}. There are: {TEXT_INPUT}, {', '.join(STREAM_INPUTS)}.",
                "inputs",
            )
        if tensor.parameters:
            raise unsupported(f"{name}.{_first(tensor.parameters)}", "input tensors have no parameters")
        if raw and tensor.HasField("contents"):
            raise invalid(
                f"The input '{name}' has contents twice: 'contents' and 'raw_input_contents'.", name
            )
        content = raw[index] if raw else None
        if name == TEXT_INPUT:
            if text is not None:
                raise invalid(f"The input '{name}' is there twice: a request has one prompt.", name)
            text = _read_text(tensor, content)
        elif stream is not None:
            raise invalid("'streaming' and 'stream' are the same input: give it once.", name)
        else:
            stream = _read_flag(tensor, content)
    if text is None:
        raise invalid(f"Missing required input: '{TEXT_INPUT}'.", TEXT_INPUT)
    return text, bool(stream)


def _read_text(tensor: ModelInferRequest.InferInputTensor, raw: bytes | None) -> str:
    _check_type(tensor, "BYTES", ([1], [1, 1]))
    if raw is not None:
        if len(raw) < 4 or int.from_bytes(raw[:4], "little") != len(raw) - 4:
            raise invalid(
                f"The raw content of '{TEXT_INPUT}' is not one element: its length in 4 bytes "
                "(little-endian), then its bytes.",
                TEXT_INPUT,
            )
        content = raw[4:]
    else:
        [content] = _one_element(tensor, "bytes_contents")
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as exc:
        raise invalid(f"'{TEXT_INPUT}' is not valid UTF-8 (byte {exc.start}).", TEXT_INPUT) from exc


def _read_flag(tensor: ModelInferRequest.InferInputTensor, raw: bytes | None) -> bool:
    _check_type(tensor, "BOOL", ([1], [1, 1]))
    if raw is not None:
        if raw not in (b"\0", b"\1"):
            raise invalid(f"The raw content of '{tensor.name}' is not one byte, 0 or 1.", tensor.name)
        return raw == b"\1"
    [value] = _one_element(tensor, "bool_contents")
    return bool(value)


def _check_type(
    tensor: ModelInferRequest.InferInputTensor, datatype: str, shapes: tuple[list[int], ...]
) -> None:
    if tensor.datatype != datatype:
        raise invalid(
            f"Input '{tensor.name}' has the datatype {_shown(tensor.datatype)} and must have {datatype!r}.",
            tensor.name,
        )
    if list(tensor.shape) not in shapes:
        shape = list(tensor.shape[:4])
        raise invalid(
            f"Input '{tensor.name}' has the shape {shape} and must have [1]: there are no batches.",
            tensor.name,
        )


def _one_element(tensor: ModelInferRequest.InferInputTensor, field: str) -> Any:
    """Return the one element of the field of a tensor's typed contents, as a sequence."""
    given = {descriptor.name for descriptor, _ in tensor.contents.ListFields()}
    elements = getattr(tensor.contents, field)
    if given - {field}:
        raise invalid(
            f"Input '{tensor.name}' has '{min(given - {field})}', and its datatype takes '{field}'.",
            tensor.name,
        )
    if len(elements) != 1:
        raise invalid(
            f"Input '{tensor.name}' has {len(elements)} elements in '{field}' and must have 1.", tensor.name
        )
    return elements


def _read_outputs(request: ModelInferRequest) -> tuple[str, ...]:
    """Return the names of the wanted outputs; without any, all are wanted."""
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise invalid(
                f"Unknown output: {_shown(output.name)}. There are: {', '.join(OUTPUTS)}.", "outputs"
            )
        if output.parameters:
            raise unsupported(f"{output.name}.{_first(output.parameters)}", "outputs have no parameters")
    return tuple(dict.fromkeys(output.name for output in request.outputs)) or OUTPUTS


# --------------------------------------------------------------------------- parameters


def _read_parameters(parameters: Mapping[str, InferParameter]) -> dict[str, Any]:
    """Return the parameters of the request as fields of a completion's body."""
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        sort = parameter.WhichOneof("parameter_choice")
        if sort is None:
            raise invalid(f"The parameter {_shown(name)} has no value.", name)
        if name in _REFUSED:
            raise unsupported(name, _REFUSED[name])
        value = getattr(parameter, sort)
        if name == FINAL_FLAG:
            if sort != "bool_param":
                raise invalid(f"Invalid value for '{name}': it is a boolean.", name)
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise invalid(f"Invalid value for {_shown(name)}: it is not a finite number.", name)
        if isinstance(value, str) and (name in _JSON or (name == "stop" and value.startswith("["))):
            value = _read_json(name, value)
        fields[name] = value
    return fields


def _read_json(name: str, text: str) -> Any:
    """Return the value that a string parameter holds as JSON. A stop string may look like JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        if name == "stop":
            return text
        raise invalid(f"Invalid value for '{name}': the string is not JSON.", name) from exc


def _first(names: Iterable[str]) -> str:
    return _shown(min(names)).strip("'\"")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:64] + "…")
