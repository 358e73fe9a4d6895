"""The form of a response over gRPC: messages of output tensors, and errors as status codes. Pure.

The messages of a stream are framed, as the parts of a response are joined on their way to the server.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from dynamo_redis.frontend.choices import CompletionChoice, Part, Usage
from dynamo_redis.frontend.forms.base import ErrorForm
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.kserve.inference_pb2 import (
    ModelInferResponse,
    ModelStreamInferResponse,
)
from dynamo_redis.frontend.kserve.requests import VERSION, KserveBody

_LENGTH: Final = struct.Struct(">I")
_RAW_LENGTH: Final = struct.Struct("<I")

FINAL: Final = "triton_final_response"
"""Triton's mark on the responses of a stream: true on the last one for a request."""


def framed(message: bytes) -> bytes:
    """Return a message behind its length."""
    return _LENGTH.pack(len(message)) + message


def messages_of(content: bytes) -> Iterator[bytes]:
    """Yield the messages of whole frames."""
    start = 0
    while start < len(content):
        begin = start + _LENGTH.size
        start = begin + _LENGTH.unpack_from(content, start)[0]
        yield content[begin:start]


def _raw(element: bytes) -> bytes:
    return _RAW_LENGTH.pack(len(element)) + element


class KserveErrors:
    """Errors as plain text: the server adds the status code."""

    def response(self, error: ApiError, request_id: str) -> tuple[int, bytes]:
        """Return the HTTP status, and the text of the error behind its code."""
        return error.status, f"{error.code or ''}\n{error.message}".encode(errors="replace")


KSERVE_ERRORS: Final[ErrorForm] = KserveErrors()


class KserveForm:
    """The form of one response."""

    errors: ErrorForm = KSERVE_ERRORS

    def __init__(self, model: str, body: KserveBody, *, is_stream_call: bool) -> None:
        """`is_stream_call`: the call is ModelStreamInfer, also if this answer comes whole."""
        self.model = model
        self._body = body
        self._is_stream_call = is_stream_call

    def whole(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`: a message, framed in a stream."""
        texts = ["".join(map(str, choice.parts)) for choice in choices]
        response = self.response(texts, [choice.finish_reason or "" for choice in choices])
        return self.encoded(response, is_final=True) if self._is_stream_call else response.SerializeToString()

    def encoder(self, choice: CompletionChoice) -> KserveEncoder:
        """See `ResponseForm`."""
        return KserveEncoder(self)

    def end(self, choices: Sequence[CompletionChoice], usage: Usage) -> bytes:
        """See `ResponseForm`: the last message of a choice is that of the stream."""
        return b""

    def failure(self, error: ApiError, request_id: str) -> bytes:
        """See `ResponseForm`: an empty frame, then the error's status and text."""
        status, text = self.errors.response(error, request_id)
        return framed(b"") + framed(f"{status}\n".encode() + text)

    def response(self, texts: Sequence[str], finish_reasons: Sequence[str]) -> ModelInferResponse:
        """Make a message with one element for each choice."""
        tensors = {
            "text_output": [text.encode(errors="replace") for text in texts],
            "finish_reason": [reason.encode() for reason in finish_reasons],
        }
        response = ModelInferResponse(model_name=self.model, model_version=VERSION, id=self._body.request_id)
        for name in self._body.outputs:
            elements = tensors[name]
            output = response.outputs.add(name=name, datatype="BYTES", shape=[len(elements)])
            if self._body.is_raw:
                response.raw_output_contents.append(b"".join(map(_raw, elements)))
            else:
                output.contents.bytes_contents.extend(elements)
        return response

    def encoded(self, response: ModelInferResponse, *, is_final: bool) -> bytes:
        """Return a message of a stream."""
        response.parameters[FINAL].bool_param = is_final
        return framed(ModelStreamInferResponse(infer_response=response).SerializeToString())


class KserveEncoder:
    """Encodes the messages of a streamed answer: one for each part, then one with the finish reason."""

    __slots__ = ("_form",)

    def __init__(self, form: KserveForm) -> None:
        self._form = form

    def begin(self) -> bytes:
        """See `ChoiceEncoder`."""
        return b""

    def parts(self, parts: Sequence[Part]) -> bytes:
        """See `ChoiceEncoder`. The parts are plain texts: text completions have no parser."""
        form = self._form
        return b"".join([form.encoded(form.response([str(part)], [""]), is_final=False) for part in parts])

    def end(self, finish_reason: str) -> bytes:
        """See `ChoiceEncoder`."""
        return self._form.encoded(self._form.response([""], [finish_reason]), is_final=True)
