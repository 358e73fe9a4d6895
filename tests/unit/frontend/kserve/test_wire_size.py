"""The look into a message before it is parsed: what it counts, and what it makes of rubbish."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.kserve.inference_pb2 import ModelInferRequest
from dynamo_redis.frontend.kserve.requests import read_request
from dynamo_redis.frontend.kserve.wire_size import MOST_OTHER_BYTES, BrokenMessage, check_size, id_in
from tests.kserve_client import flag_tensor, infer_request, parameter, text_tensor

WHOLE = infer_request(
    text_tensor(parameters={"a": parameter(1)}),
    flag_tensor(),
    id="seven",
    raw_input_contents=[b"x"],
    parameters={"temperature": 0.5, "seed": -1, "stop": "\n", "ignore_eos": True},
    outputs=[ModelInferRequest.InferRequestedOutputTensor(name="text_output")],
)


def size_refused(request: ModelInferRequest) -> bool:
    try:
        check_size(memoryview(request.SerializeToString()))
    except ApiError:
        return True
    return False


def test_contents_of_tensors_do_not_count() -> None:
    large = b"a" * (2 * MOST_OTHER_BYTES)
    assert not size_refused(infer_request(text_tensor(large)))
    assert not size_refused(infer_request(text_tensor(contents=None), raw_input_contents=[large]))


def test_everything_else_counts() -> None:
    large = "a" * MOST_OTHER_BYTES
    assert size_refused(infer_request(model_name=large))
    assert size_refused(infer_request(parameters={"stop": large}))
    assert size_refused(infer_request(parameters={large: 1}))
    assert size_refused(infer_request(text_tensor(name=large)))
    assert size_refused(infer_request(text_tensor(shape=[1] * MOST_OTHER_BYTES)))
    assert size_refused(infer_request(raw_input_contents=[b""] * MOST_OTHER_BYTES))


def test_id_is_found_without_parsing() -> None:
    assert id_in(memoryview(WHOLE.SerializeToString())) == "seven"
    assert id_in(memoryview(infer_request().SerializeToString())) == ""
    assert id_in(memoryview(b"\xff")) == ""


@given(st.integers(min_value=0, max_value=len(WHOLE.SerializeToString())))
def test_cut_messages_do_not_raise_others(size: int) -> None:
    content = WHOLE.SerializeToString()[:size]
    try:
        check_size(memoryview(content))
    except BrokenMessage:
        return
    ModelInferRequest.FromString(content)  # cut between two fields


@given(st.binary(max_size=200))
def test_rubbish_is_an_invalid_request(content: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_request([bytearray(content)], may_stream=True))
    assert 400 <= caught.value.status < 500
