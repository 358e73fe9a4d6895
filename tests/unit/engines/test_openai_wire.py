"""What an OpenAI-compatible server is asked, and how its answer becomes tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.openai_wire import (
    DONE,
    CompletionReader,
    Dialect,
    SseReader,
    TextTokens,
    completion_body,
    dialect_of,
    hidden_stop_ids,
    prompt_ids,
    refusal,
)
from dynamo_redis.errors import (
    HandlerFailed,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
)
from dynamo_redis.runtime.llm_protocol import GenerateItem


class Tokens:
    """A tokenizer as the engine uses it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Any) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def words_with_spaces_before_them() -> Tokenizer:
    """A tokenizer in the manner of SentencePiece: what is not in its vocabulary is spelled in bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names += [*"▁abcdefghijklmnopqrstuvwxyz.,", "▁t", "▁th", "▁the", "he"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e")]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL = Tokens(Tokenizer.from_file(str(DEMO_MODEL_PATH / "tokenizer.json")))
METASPACE = Tokens(words_with_spaces_before_them())

letters = st.sampled_from([*"theabc ., \n", "é", "漢", "🙂", "the ", " the", "<|im_end|>"])
pieces = st.lists(st.lists(letters, min_size=1, max_size=6).map("".join), min_size=1, max_size=6)


@pytest.mark.parametrize("tokens", [BYTE_LEVEL, METASPACE], ids=["byte level", "metaspace"])
@given(pieces)
def test_tokens_of_text_in_pieces_say_exactly_that_text(tokens: Tokens, texts: list[str]) -> None:
    if tokens is METASPACE:
        texts = ["a", *texts]  # such a tokenizer has no word for a text that begins with a space
    encoder = TextTokens(tokens)
    ids = [token for text in texts for token in encoder.feed(text)]
    if not encoder.inexact_count:
        assert tokens.decode(ids) == "".join(texts)
    else:
        assert tokens is METASPACE


def test_plain_text_is_never_inexact() -> None:
    for tokens in (BYTE_LEVEL, METASPACE):
        encoder = TextTokens(tokens)
        ids = [token for text in ("The", " cat", "s are", " the", "re.") for token in encoder.feed(text)]
        assert tokens.decode(ids) == "The cats are there."
        assert encoder.inexact_count == 0


REQUEST = {
    "model": "demo",
    "token_ids": [1, 2],
    "stop_conditions": {
        "max_tokens": 5,
        "min_tokens": 2,
        "stop": ["END"],
        "stop_token_ids_hidden": [9],
        "ignore_eos": False,
    },
    "sampling_options": {
        "n": 1,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 3,
        "repetition_penalty": 1.1,
        "seed": 0,
        "frequency_penalty": None,
    },
    "eos_token_ids": [7],
}
STANDARD = {
    "model": "m",
    "prompt": [1, 2],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "stop": ["END"],
    "temperature": 0.0,
    "top_p": 0.9,
    "seed": 0,
}
FURTHER = {"top_k": 3, "min_tokens": 2, "ignore_eos": False, "stop_token_ids": [9]}


@pytest.mark.parametrize(
    ("dialect", "more"),
    [
        ("openai", {}),
        ("vllm", FURTHER | {"repetition_penalty": 1.1, "return_token_ids": True}),
        ("sglang", FURTHER | {"repetition_penalty": 1.1, "return_token_ids": True, "data_parallel_rank": 1}),
        ("llamacpp", FURTHER | {"repeat_penalty": 1.1, "cache_prompt": True}),
    ],
)
def test_each_kind_of_server_is_asked_in_its_own_words(dialect: Dialect, more: dict[str, Any]) -> None:
    body = completion_body(REQUEST, model="m", dialect=dialect, prompt=[1, 2], dp_rank=1)
    assert body == STANDARD | more


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(InvalidRequest):
        prompt_ids({"token_ids": [True]})
    with pytest.raises(InvalidRequest):
        completion_body({"stop_conditions": 3}, model="m", dialect="vllm", prompt=[1], dp_rank=None)
    with pytest.raises(InvalidRequest):
        hidden_stop_ids({"eos_token_ids": 3})


def test_who_lists_models_says_whose_server_it_is() -> None:
    assert dialect_of({"data": [{"owned_by": "vllm"}]}) == "vllm"
    assert dialect_of({"data": [{"owned_by": "me"}]}) == "openai"
    assert dialect_of({"data": []}) == dialect_of({}) == "openai"


@given(st.integers(1, 7))
def test_events_come_whole_whatever_the_cuts(size: int) -> None:
    content = b': comment\r\ndata: {"a":1}\r\n\r\nevent: x\ndata:{"b":2}\n\ndata: [DONE]\n\n'
    reader = SseReader()
    found = [
        event
        for start in range(0, len(content), size)
        for event in reader.feed(content[start : start + size])
    ]
    assert found == [b'{"a":1}', b'{"b":2}', DONE]


def test_an_event_without_end_is_refused() -> None:
    reader = SseReader(max_bytes=10)
    with pytest.raises(ProtocolViolation):
        list(reader.feed(b"data: 0123456789"))


def reader(hidden: frozenset[int] = frozenset()) -> CompletionReader:
    return CompletionReader(BYTE_LEVEL, hidden)


def choice(**fields: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": None, **fields}]}).encode()


def test_ids_are_taken_before_text_and_the_last_item_waits_for_the_usage() -> None:
    completion = reader()
    assert completion.feed(choice(text="x", token_ids=[5, 6])) == {"token_ids": [5, 6]}
    assert completion.feed(choice(token_ids=[7], finish_reason="length")) is None
    assert completion.feed(b'{"choices":[],"usage":{"prompt_tokens_details":{"cached_tokens":3}}}') is None
    last: GenerateItem = {"token_ids": [7], "finish_reason": "length", "cached_tokens": 3}
    assert completion.feed(DONE) == last
    assert completion.complete
    assert completion.finish() is None


def test_the_end_of_sequence_token_is_not_part_of_the_answer() -> None:
    completion = reader(frozenset({2}))
    completion.feed(choice(token_ids=[7, 2], finish_reason="stop"))
    assert completion.finish() == {"token_ids": [7], "finish_reason": "stop"}


def test_llama_cpp_tells_its_cache_in_its_timings() -> None:
    completion = reader()
    completion.feed(b'{"choices":[{"text":"","finish_reason":"stop"}],"timings":{"cache_n":12}}')
    assert completion.finish() == {"token_ids": [], "finish_reason": "stop", "cached_tokens": 12}


def test_other_ends_are_errors() -> None:
    completion = reader()
    completion.feed(choice(finish_reason="abort"))
    assert completion.finish() == {"token_ids": [], "finish_reason": "error"}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'{"error": {"message": "no", "code": 400}}', InvalidRequest),
        (b'{"error": {"message": "no"}}', HandlerFailed),
        (b'{"error": "no"}', HandlerFailed),
        (b"not json", ProtocolViolation),
        (b"[1]", ProtocolViolation),
        (b'{"choices": [{"text": 3}]}', ProtocolViolation),
        (choice(token_ids=["x"]), ProtocolViolation),
        (choice(token_ids=[-5]), ProtocolViolation),
        (choice(token_ids=[1 << 40]), ProtocolViolation),
        (choice(token_ids=[True]), ProtocolViolation),
    ],
)
def test_errors_within_a_stream(data: bytes, error: type[PlaneError]) -> None:
    with pytest.raises(error):
        reader().feed(data)


def test_refusals_tell_what_the_server_says() -> None:
    busy = refusal(503, b'{"detail": "loading"}', "7")
    assert isinstance(busy, Overloaded)
    assert busy.retry_after_s == 7
    assert "loading" in str(busy)
    assert "too long" in str(refusal(400, b'{"error": {"message": "too long"}}', None))
    assert "plain" in str(refusal(500, b"plain \xff", None))
    assert refusal(429, b"", "Wed, 21 Oct 2015 07:28:00 GMT").retryable
