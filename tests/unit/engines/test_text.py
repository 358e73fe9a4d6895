"""The text of the mock engine's answers."""

from __future__ import annotations

from itertools import islice

import pytest
from tokenizers import Tokenizer

from dynamo_redis.engines.text import SENTENCE_COUNT, Phrasebook, sentences
from dynamo_redis.models.directory import ModelDirectory


@pytest.fixture(scope="module")
def tokenizer(demo_model: ModelDirectory) -> Tokenizer:
    return Tokenizer.from_buffer(demo_model.read_tokenizer())


def test_sentences_are_whole_and_mostly_different() -> None:
    found = sentences()
    assert len(found) == SENTENCE_COUNT
    assert all(text[0].isupper() and text.endswith(".") for text in found)
    assert len(set(found)) > SENTENCE_COUNT * 0.95
    assert any(not text.isascii() for text in found)


def test_answer_is_whole_sentences_in_the_models_tokens(tokenizer: Tokenizer) -> None:
    book = Phrasebook(tokenizer)
    texts = set(sentences())
    for key in range(50):
        answer = tokenizer.decode(list(islice(book.tokens(key), book.length(key))))
        parts = [f"{part}." for part in answer.removesuffix(".").split(". ")]
        assert 2 <= len(parts) <= 8
        assert set(parts) <= texts


def test_answer_depends_on_its_key_alone(tokenizer: Tokenizer) -> None:
    first, second = Phrasebook(tokenizer), Phrasebook(tokenizer)
    assert [*islice(first.tokens(7), 200)] == [*islice(second.tokens(7), 200)]
    assert len({tuple(islice(first.tokens(key), 60)) for key in range(100)}) == 100


def test_answer_has_no_end(tokenizer: Tokenizer) -> None:
    assert len([*islice(Phrasebook(tokenizer).tokens(1), 10_000)]) == 10_000
