"""Embeddings in the frontend: bodies, and the items of workers."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.mock.embedding import unit_vector
from dynamo_redis.errors import ConnectionLost, EngineFailed, HandlerFailed, InvalidRequest, ProtocolViolation
from dynamo_redis.frontend.embedding_answer import EmbeddingDecoder
from dynamo_redis.frontend.embedding_body import MAX_INPUTS, EmbeddingBody, EmbeddingOptions
from dynamo_redis.frontend.http.bodies import Body, pack, unpack
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.openai import read_body
from dynamo_redis.frontend.tokens import Tokenizer
from dynamo_redis.models import vectors


def options(**change: Any) -> EmbeddingOptions:
    body = read_body(EmbeddingBody, json.dumps({"model": "m", "input": "Hi", **change}).encode())
    return body.options()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input[0]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": [1, "a"]}, "input[1]"),
        ({"input": [1, -1]}, "input[1]"),
        ({"input": [1, 2**40]}, "input[1]"),
        ({"input": [1.5]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": [[1]] * (MAX_INPUTS + 1)}, "input"),
        ({"input": [[[1]]]}, "input[0][0]"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": 1}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"dimensions": "4"}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": 10**30}, "dimensions"),
        ({"dimension": 4}, "dimension"),
        ({"stream": True}, "stream"),
        ({"normalize": False}, "normalize"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_body_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        options(**change)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(caught.value.message) < 300


def test_neutral_parameters_are_taken() -> None:
    asked = options(user="u", encoding_format=None, dimensions=None, stream=False, nvext={}, normalize=True)
    assert (asked.encoding_format, asked.dimensions) == ("float", None)


def test_large_body_is_the_same_from_its_process() -> None:
    body = {"model": "m", "input": [[1, 2], [3]], "encoding_format": "base64", "dimensions": 8}
    unpacked: Body = unpack(bytearray(pack(bytearray(EmbeddingBody.tag + json.dumps(body).encode()))))
    assert isinstance(unpacked.options, EmbeddingOptions)
    assert (unpacked.options.encoding_format, unpacked.options.dimensions) == ("base64", 8)
    assert [list(source) for source in unpacked.source] == [[1, 2], [3]]  # type: ignore[arg-type]
    assert unpacked.choice_count == 1


# --------------------------------------------------------------------------- items of workers


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_files(DEMO_MODEL_PATH)


def decoder(tokenizer: Tokenizer, count: int = 2, **change: Any) -> EmbeddingDecoder:
    return EmbeddingDecoder(tokenizer.detokenizer(), options(**change), [[5, 6]] * count)


def entries(text: str) -> list[dict[str, Any]]:
    return json.loads(f"[{text}]")  # type: ignore[no-any-return]


VECTORS = [[1.0, -0.5], [0.25, 2.0]]
FORMS: dict[str, list[dict[str, Any]]] = {
    "one item": [{"embeddings": VECTORS, "prompt_tokens": 9}],
    "two items": [
        {"embeddings": [each], "prompt_tokens": n} for each, n in zip(VECTORS, (4, 5), strict=True)
    ],
    "base64": [{"embeddings": [vectors.pack(each) for each in VECTORS], "prompt_tokens": 9}],
    "openai": [
        {
            "data": [{"index": index, "embedding": VECTORS[index]} for index in (1, 0)],
            "usage": {"prompt_tokens": 9},
        }
    ],
    "integers": [{"embeddings": [[1, -0.5], [0.25, 2]], "prompt_tokens": 9}],
}


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("form", FORMS)
def test_workers_forms_give_one_answer(tokenizer: Tokenizer, form: str, encoding_format: str) -> None:
    decoding = decoder(tokenizer, encoding_format=encoding_format)
    found = [entry for item in FORMS[form] for entry in entries(decoding.feed(item))]
    wanted: list[Any] = VECTORS
    if encoding_format == "base64":
        wanted = [base64.b64encode(struct.pack("<2f", *each)).decode() for each in VECTORS]
    assert found == [
        {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(wanted)
    ]
    assert (decoding.finish_reason, decoding.prompt_token_count) == ("stop", 9)
    decoding.check_complete()


def test_tokens_are_counted_without_the_worker(tokenizer: Tokenizer) -> None:
    decoding = decoder(tokenizer)
    decoding.feed({"embeddings": VECTORS})
    assert decoding.prompt_token_count == 4


def test_restarted_answer_begins_anew(tokenizer: Tokenizer) -> None:
    decoding = decoder(tokenizer)
    decoding.feed({"embeddings": VECTORS[:1], "prompt_tokens": 50})
    decoding.restart()
    found = entries(decoding.feed({"embeddings": VECTORS, "prompt_tokens": 9}))
    assert [entry["index"] for entry in found] == [0, 1]
    assert decoding.prompt_token_count == 9


@pytest.mark.parametrize(
    ("item", "error"),
    [
        ("text", ProtocolViolation),
        ({"embeddings": 5}, ProtocolViolation),
        ({"embeddings": [5]}, ProtocolViolation),
        ({"embeddings": [[]]}, ProtocolViolation),
        ({"embeddings": [["1"]]}, ProtocolViolation),
        ({"embeddings": [b"12345678"]}, ProtocolViolation),
        ({"embeddings": [{1: 2}]}, ProtocolViolation),
        ({"embeddings": [None]}, ProtocolViolation),
        ({"embeddings": [[float("nan")]]}, ProtocolViolation),
        ({"embeddings": [[float("inf")]]}, ProtocolViolation),
        ({"embeddings": [[10**400]]}, ProtocolViolation),
        ({"embeddings": ["no base64!"]}, ProtocolViolation),
        ({"embeddings": ["AAA="]}, ProtocolViolation),
        ({"embeddings": [[1.0], [1.0, 2.0]]}, ProtocolViolation),
        ({"embeddings": [[1.0]] * 3}, ProtocolViolation),
        ({"data": [{"embedding": [1.0]}]}, ProtocolViolation),
        ({"data": [5]}, ProtocolViolation),
        ({"finish_reason": "error: out of memory"}, HandlerFailed),
    ],
    ids=lambda value: str(value)[:40],
)
def test_nonsense_of_a_worker_is_an_error(tokenizer: Tokenizer, item: Any, error: type[Exception]) -> None:
    for encoding_format in ("float", "base64"):
        with pytest.raises(error):
            decoder(tokenizer, encoding_format=encoding_format).feed(item)


def test_numbers_beyond_float32_are_no_base64(tokenizer: Tokenizer) -> None:
    decoder(tokenizer).feed({"embeddings": [[1e39, 1.0]]})
    with pytest.raises(ProtocolViolation, match="beyond float32"):
        decoder(tokenizer, encoding_format="base64").feed({"embeddings": [[1e39, 1.0]]})


def test_long_item_is_decoded_in_turns(tokenizer: Tokenizer) -> None:
    decoding = decoder(tokenizer, count=9)
    texts = [decoding.feed({"embeddings": [[0.5] * 10_000] * 9, "prompt_tokens": 9})]
    while decoding.held:
        assert decoding.finish_reason is None
        texts.append(decoding.feed_held())
    assert [len(entries(text)) for text in texts] == [4, 4, 1]
    assert [entry["index"] for entry in entries(",".join(texts))] == list(range(9))
    assert (decoding.finish_reason, decoding.prompt_token_count) == ("stop", 9)


def test_missing_embedding_breaks_the_answer_off(tokenizer: Tokenizer) -> None:
    decoding = decoder(tokenizer)
    with pytest.raises(EngineFailed):
        decoding.check_complete()
    decoding.feed({"embeddings": VECTORS[:1]})
    with pytest.raises(ConnectionLost):
        decoding.check_complete()


def test_dimensions_that_are_not_kept_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"dimensions: .* of 2 numbers, not of 1"):
        decoder(tokenizer, dimensions=1).feed({"embeddings": VECTORS})
    assert decoder(tokenizer, dimensions=2).feed({"embeddings": VECTORS})


def test_vectors_of_the_mock_engine_are_units() -> None:
    one, other = unit_vector([1, 2, 3], 64), unit_vector([1, 2, 4], 64)
    assert one == unit_vector([1, 2, 3], 64) != other
    assert sum(number * number for number in one) == pytest.approx(1.0)
    shorter = unit_vector([1, 2, 3], 8)
    assert [number / shorter[0] for number in shorter] == pytest.approx(
        [number / one[0] for number in one[:8]]
    )
    with pytest.raises(InvalidRequest):
        unit_vector([-1], 8)
