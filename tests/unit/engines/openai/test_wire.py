"""Answers and errors of an OpenAI-compatible server, as tokens and typed errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.engines.openai.wire import (
    DONE,
    CompletionReader,
    SseReader,
    TextTokens,
    UnknownModel,
    refusal,
)
from dynamo_redis.errors import (
    ConnectionLost,
    ContextLengthExceeded,
    EngineFailed,
    HandlerFailed,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
    RateLimited,
)
from dynamo_redis.frontend.tokens import WindowDetokenizer
from dynamo_redis.models.llm_protocol import GenerateItem


class Tokens:
    """A tokenizer as the engine uses it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True
        named = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.byte_ids = [token for token in named if token is not None]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Any) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def encode_bytes(self, text: str) -> list[int] | None:
        return [self.byte_ids[byte] for byte in text.encode()] if self.byte_ids else None


def words_with_spaces_before_them() -> Tokenizer:
    """A tokenizer as of SentencePiece: characters outside its vocabulary become byte tokens."""
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
def test_tokens_of_text_pieces_have_exactly_that_text(tokens: Tokens, texts: list[str]) -> None:
    encoder = TextTokens(tokens)
    ids = [token for text in texts for token in encoder.feed(text)]
    assert encoder.inexact_count == 0
    assert tokens.decode(ids) == "".join(texts)


@pytest.mark.parametrize("tokens", [BYTE_LEVEL, METASPACE], ids=["byte level", "metaspace"])
@given(pieces)
def test_frontend_shows_the_engines_text(tokens: Tokens, texts: list[str]) -> None:
    encoder, detokenizer = TextTokens(tokens), WindowDetokenizer(tokens.decode)
    shown = [detokenizer.feed(encoder.feed(text)) for text in texts]
    assert "".join(shown) + detokenizer.finish() == "".join(texts)


@pytest.mark.parametrize("text", ["你好，世界", "한국어 답변입니다", "✓✓✓ done", "नमस्ते दुनिया"])
def test_single_letters_get_no_space_between(text: str) -> None:
    encoder = TextTokens(METASPACE)
    ids = [token for letter in text for token in encoder.feed(letter)]
    assert METASPACE.decode(ids) == text


def test_plain_text_is_never_inexact() -> None:
    for tokens in (BYTE_LEVEL, METASPACE):
        encoder = TextTokens(tokens)
        ids = [token for text in ("The", " cat", "s are", " the", "re.") for token in encoder.feed(text)]
        assert tokens.decode(ids) == "The cats are there."
        assert encoder.inexact_count == 0


@given(st.integers(1, 7))
def test_events_are_whole_at_every_split(size: int) -> None:
    content = b': comment\r\ndata: {"a":1}\r\n\r\nevent: x\ndata:{"b":2}\n\ndata: [DONE]\n\n'
    reader = SseReader()
    found = [
        event
        for start in range(0, len(content), size)
        for event in reader.feed(content[start : start + size])
    ]
    assert found == [b'{"a":1}', b'{"b":2}', DONE]


def test_endless_event_is_refused() -> None:
    reader = SseReader(max_bytes=10)
    with pytest.raises(ProtocolViolation):
        list(reader.feed(b"data: 0123456789"))


def reader(hidden: frozenset[int] = frozenset()) -> CompletionReader:
    return CompletionReader(BYTE_LEVEL, hidden)


def choice(**fields: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": None, **fields}]}).encode()


def test_ids_are_preferred_to_text_and_usage_is_waited_for() -> None:
    completion = reader()
    assert completion.feed(choice(text="x", token_ids=[5, 6])) == {"token_ids": [5, 6]}
    assert completion.feed(choice(token_ids=[7], finish_reason="length")) is None
    assert completion.feed(b'{"choices":[],"usage":{"prompt_tokens_details":{"cached_tokens":3}}}') is None
    assert completion.feed(DONE) is None
    last: GenerateItem = {"token_ids": [7], "finish_reason": "length", "cached_tokens": 3}
    assert completion.finish() == last
    assert completion.complete


def test_last_item_has_the_engines_counts() -> None:
    completion = reader()
    completion.feed(choice(text="Hello", finish_reason="stop"))
    completion.feed(b'{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":"x"}}')
    last = completion.finish()
    assert last["completion_usage"] == {"prompt_tokens": 9, "completion_tokens": 4}


def test_end_of_sequence_token_is_not_in_the_answer() -> None:
    completion = reader(frozenset({2}))
    completion.feed(choice(token_ids=[7, 2], finish_reason="stop"))
    assert completion.finish() == {"token_ids": [7], "finish_reason": "stop"}


def test_llama_cpp_has_cached_tokens_in_timings() -> None:
    completion = reader()
    completion.feed(b'{"choices":[{"text":"","finish_reason":"stop"}],"timings":{"cache_n":12}}')
    assert completion.finish() == {"token_ids": [], "finish_reason": "stop", "cached_tokens": 12}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("eos_token", "stop"),
        ("STOP", "stop"),
        ("tool_calls", "stop"),
        ("what no engine says yet", "stop"),
        (7, "stop"),
        ({"type": "length", "length": 5}, "length"),
        ("max_tokens", "length"),
        ("content_filter", "content_filter"),
        ("abort", "length"),
    ],
)
def test_any_finish_reason_loses_no_token(said: Any, reason: str) -> None:
    completion = reader()
    assert completion.feed(choice(token_ids=[5])) == {"token_ids": [5]}
    completion.feed(choice(token_ids=[6], finish_reason=said))
    assert completion.finish() == {"token_ids": [6], "finish_reason": reason}
    assert completion.aborted == (said == "abort")


def test_empty_finish_reasons_are_none() -> None:
    completion = reader()
    for token in (5, 6):
        assert completion.feed(choice(token_ids=[token], finish_reason="")) == {"token_ids": [token]}
    completion.feed(choice(finish_reason="stop"))
    assert completion.finish() == {"token_ids": [], "finish_reason": "stop"}


def test_finish_reason_in_each_chunk_loses_no_token() -> None:
    completion = reader()
    given = [completion.feed(choice(token_ids=[token], finish_reason="stop")) for token in (5, 6, 7)]
    assert given == [None, {"token_ids": [5]}, {"token_ids": [6]}]
    assert completion.finish()["token_ids"] == [7]


@pytest.mark.parametrize(("limit", "reason"), [(None, "stop"), (3, "stop"), (2, "length")])
def test_done_without_a_reason_ends_the_answer(limit: int | None, reason: str) -> None:
    completion = CompletionReader(BYTE_LEVEL, frozenset(), limit)
    completion.feed(choice(token_ids=[5, 6]))
    completion.feed(DONE)
    assert completion.finish() == {"token_ids": [], "finish_reason": reason}


def test_last_usage_without_reason_ends_the_answer() -> None:
    completion = reader()
    completion.feed(choice(token_ids=[5, 6]))
    completion.feed(b'{"choices":[],"usage":{"completion_tokens":2}}')
    assert completion.finish()["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "events",
    [
        [],
        [DONE],
        [choice(token_ids=[5])],
        [b'{"choices":[{"token_ids":[5]}],"usage":{"completion_tokens":1}}'],
        [choice(finish_reason="abort"), DONE],
    ],
)
def test_cut_off_answer_is_never_complete(events: list[bytes]) -> None:
    completion = reader()
    for event in events:
        completion.feed(event)
    with pytest.raises(ConnectionLost):
        completion.finish()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'{"error": {"message": "no", "code": 400}}', InvalidRequest),
        (b'{"error": {"message": "no"}}', EngineFailed),
        (b'{"error": {"message": "slow down", "code": 429}}', RateLimited),
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
def test_errors_in_a_stream_are_raised(data: bytes, error: type[PlaneError]) -> None:
    with pytest.raises(error):
        reader().feed(data)


def test_refusals_have_the_servers_message() -> None:
    busy = refusal(503, b'{"detail": "loading"}', "7")
    assert isinstance(busy, Overloaded)
    assert busy.retry_after_s == 7
    assert "loading" in str(busy)
    assert "too long" in str(refusal(400, b'{"error": {"message": "too long"}}', None))
    assert "plain" in str(refusal(500, b"plain \xff", None))
    limited = refusal(429, b"", "Wed, 21 Oct 2015 07:28:00 GMT")
    assert limited.retryable
    assert isinstance(limited, RateLimited)
    assert limited.retry_after_s is None


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens and your request has 3000 input tokens",
        "the request exceeds the available context size, try increasing it",
        "The decoder prompt (length 9) is longer than the maximum model length of 8",
        '{"error": {"code": "context_length_exceeded"}}',
    ],
)
def test_overflow_of_the_context_has_its_own_error(message: str) -> None:
    assert type(refusal(400, message.encode(), None)) is ContextLengthExceeded
    assert type(refusal(400, b"temperature is too hot", None)) is InvalidRequest


def test_refused_keys_are_not_repeated_to_clients() -> None:
    error = refusal(401, b'{"error": {"message": "Incorrect API key: secret-key"}}', None)
    assert isinstance(error, EngineFailed)
    assert "secret-key" not in str(error)
    assert "DYN_ENGINE_API_KEY" in str(error)


def test_unknown_model_is_no_invalid_request() -> None:
    error = refusal(404, b'{"error": {"message": "The model `old` does not exist."}}', None)
    assert isinstance(error, UnknownModel)
    assert not isinstance(error, InvalidRequest)
    assert error.retryable


def test_events_with_lone_surrogates_are_read() -> None:
    reader = CompletionReader(BYTE_LEVEL, frozenset())
    [item] = reader.items([rb'{"choices": [{"text": "\ud83d", "token_ids": [7]}]}'])
    assert item == {"token_ids": [7]}
