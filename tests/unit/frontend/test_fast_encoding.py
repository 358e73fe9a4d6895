"""Encoding by fastokens: the same tokens, or not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_redis.engines.demo_model import DEMO_MODEL_PATH
from dynamo_redis.errors import ModelError
from dynamo_redis.frontend.fast_encoding import FastEncoder, probe_texts
from dynamo_redis.frontend.tokens import Tokenizer

pytest.importorskip("fastokens", reason="fastokens has no wheel for this platform")


@pytest.fixture
def content() -> bytes:
    return (Path(DEMO_MODEL_PATH) / "tokenizer.json").read_bytes()


def changed(content: bytes, **parts: object) -> bytes:
    return json.dumps({**json.loads(content), **parts}).encode()


def test_accelerated_tokenizer_gives_the_same_tokens(content: bytes) -> None:
    slow, fast = Tokenizer(content), Tokenizer(content)
    fast.accelerate(content)
    assert fast.inline_bytes > slow.inline_bytes > 0
    for text in (*probe_texts(["<|im_end|>"]), "plain words " * 5000):
        for special in (False, True):
            assert fast.encode(text, add_special_tokens=special) == slow.encode(
                text, add_special_tokens=special
            )


def test_encoder_that_differs_is_not_used(content: bytes) -> None:
    tokenizer = Tokenizer(content)
    other = changed(content, normalizer={"type": "NFC"})
    with pytest.raises(ModelError, match="gives other tokens for the text"):
        tokenizer.accelerate(other)
    assert tokenizer.inline_bytes == Tokenizer(content).inline_bytes
    assert tokenizer.encode("e\u0301") == Tokenizer(content).encode("e\u0301")


@pytest.mark.parametrize(
    "part",
    [{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}}, {"pre_tokenizer": {"type": "?"}}],
)
def test_unsupported_file_is_refused(content: bytes, part: dict[str, object]) -> None:
    tokenizer = Tokenizer(content)
    with pytest.raises(ModelError, match="fastokens"):
        tokenizer.accelerate(changed(content, **part))
    assert tokenizer.encode("word")


def test_text_that_takes_too_long_is_given_up(content: bytes) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$|."}, "behavior": "Isolated", "invert": False}
    encoder = FastEncoder(changed(content, pre_tokenizer=split))
    assert encoder.encode("b", False)
    assert encoder.encode("a" * 40 + "b", False) is None


def test_expressions_of_other_files_are_not_trusted(content: bytes) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$|."}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer(changed(content, pre_tokenizer={"type": "Sequence", "pretokenizers": [split]}))
    assert tokenizer.has_expressions
    assert tokenizer.inline_bytes == 0
