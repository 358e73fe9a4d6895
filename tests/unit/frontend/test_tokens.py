"""Tokenizers, detokenizers of both kinds, and stop strings."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dynamo_redis.errors import ModelError
from dynamo_redis.frontend.tokens import (
    ByteLevelDetokenizer,
    StopStrings,
    Tokenizer,
    WindowDetokenizer,
    is_byte_level,
)

TEXTS = [
    "The quick brown fox, 1234 times!  Two  spaces.",
    "Größe, naïve café, Ελληνικά, русский, עברית, العربية",
    "你好，世界！日本語と한국어 ไทย हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇺 🤖",
    "\n\ttabs\r\n and nul\x00 and \u2028 lines",
    "",
]


def byte_level() -> Library:
    """Return a byte-level tokenizer, trained on little text: most characters are several tokens."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS[:1], trainer)
    library.add_tokens(["<plain text>"])
    return library


def byte_fallback() -> Library:
    """Return a tokenizer like those of SentencePiece: spaces as ▁, unknown characters as bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyzTtwo",
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, "▁t", "▁th", "he"]))}
    merges = [("▁", "t"), ("▁t", "h"), ("h", "e")]
    library = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    library.add_special_tokens(["</s>"])
    return library


def wrap(library: Library) -> Tokenizer:
    return Tokenizer(library.to_str().encode())


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    return wrap(byte_level())


@pytest.fixture(scope="module")
def window_tokenizer() -> Tokenizer:
    return wrap(byte_fallback())


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: random.Random | None = None) -> str:
    """Feed tokens one by one, or in groups of random sizes."""
    detokenizer = tokenizer.detokenizer()
    pieces = []
    while ids:
        count = sizes.randrange(1, 5) if sizes else 1
        pieces.append(detokenizer.feed(ids[:count]))
        ids = ids[count:]
    return "".join(pieces) + detokenizer.finish()


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "Nonsense"}}'])
def test_a_broken_file_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer") as caught:
        Tokenizer.from_files(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        Tokenizer.from_files(tmp_path)


def test_training_time_settings_of_a_file_do_not_cut_prompts() -> None:
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=64)
    assert len(wrap(library).encode("a b c d e f g h")) == len(byte_level().encode("a b c d e f g h").ids)


def test_names_of_special_tokens_in_text_become_those_tokens(bytes_tokenizer: Tokenizer) -> None:
    assert bytes_tokenizer.encode("a<|end|>")[-1] == bytes_tokenizer.token_id("<|end|>")


def test_byte_level_decoders() -> None:
    level: dict[str, Any] = {"type": "ByteLevel"}
    assert is_byte_level(level)
    assert is_byte_level({"type": "Sequence", "decoders": [level]})
    assert not is_byte_level({"type": "Sequence", "decoders": [level, {"type": "Fuse"}]})
    assert not is_byte_level({"type": "WordPiece"})
    assert not is_byte_level(None)


# --------------------------------------------------------------------------- detokenizers


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(
    bytes_tokenizer: Tokenizer, window_tokenizer: Tokenizer, text: str
) -> None:
    for tokenizer, kind in ((bytes_tokenizer, ByteLevelDetokenizer), (window_tokenizer, WindowDetokenizer)):
        assert isinstance(tokenizer.detokenizer(), kind)
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        assert streamed(tokenizer, ids, random.Random(1)) == tokenizer.decode(ids)


def test_any_bytes_stream_as_they_decode(bytes_tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    for _ in range(2000):
        ids = [rng.randrange(bytes_tokenizer.vocabulary_size + 3) for _ in range(rng.randrange(12))]
        assert streamed(bytes_tokenizer, ids) == bytes_tokenizer.decode(ids)


def test_a_character_cut_short_is_replaced(bytes_tokenizer: Tokenizer, window_tokenizer: Tokenizer) -> None:
    for tokenizer in (bytes_tokenizer, window_tokenizer):
        ids = tokenizer.encode("x世")[:-1]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        detokenizer = tokenizer.detokenizer()
        assert detokenizer.feed(ids) == "x"
        assert set(detokenizer.finish()) == {"\ufffd"}


def test_ids_past_the_vocabulary_have_no_text(
    bytes_tokenizer: Tokenizer, window_tokenizer: Tokenizer
) -> None:
    """Models have more ids than their tokenizer. Ids that no model has are errors."""
    for tokenizer in (bytes_tokenizer, window_tokenizer):
        size = tokenizer.vocabulary_size
        assert tokenizer.detokenizer().feed([size, size + 1000]) == ""
        for wrong in (-1, 10**6, 2**40):
            with pytest.raises(OverflowError):
                tokenizer.detokenizer().feed([wrong])


def test_special_tokens_have_no_text_and_no_weight(
    bytes_tokenizer: Tokenizer, window_tokenizer: Tokenizer
) -> None:
    end = bytes_tokenizer.token_id("<|end|>")
    assert end is not None
    ids = bytes_tokenizer.encode("世")
    # In the middle of a character, too.
    assert streamed(bytes_tokenizer, [end, ids[0], end, *ids[1:], end]) == "世"
    detokenizer = window_tokenizer.detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    end = window_tokenizer.token_id("</s>")
    assert end is not None
    assert detokenizer.feed([end] * 10_000) == ""
    assert len(detokenizer._ids) < 100


def test_shown_special_tokens_have_their_text(
    bytes_tokenizer: Tokenizer, window_tokenizer: Tokenizer
) -> None:
    for tokenizer, name in ((bytes_tokenizer, "<|end|>"), (window_tokenizer, "</s>")):
        end = tokenizer.token_id(name)
        assert end is not None
        ids = [*tokenizer.encode("x"), end, *tokenizer.encode("y")]
        assert tokenizer.detokenizer(frozenset((name, "another"))).feed(ids) == tokenizer.decode(
            ids, skip_special_tokens=False
        )
        assert name not in tokenizer.detokenizer(frozenset(("another",))).feed(ids)


def test_a_window_does_not_wait_for_ever(window_tokenizer: Tokenizer) -> None:
    broken = window_tokenizer.token_id("<0xFF>")
    assert broken is not None
    detokenizer = window_tokenizer.detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    text = "".join(detokenizer.feed([broken]) for _ in range(1000))
    assert len(text) > 900
    assert len(detokenizer._ids) < 100


def test_plain_added_tokens_are_text(bytes_tokenizer: Tokenizer) -> None:
    token_id = bytes_tokenizer.token_id("<plain text>")
    assert token_id is not None
    assert (
        bytes_tokenizer.detokenizer().feed([token_id]) == "<plain text>" == bytes_tokenizer.decode([token_id])
    )


def test_the_decoder_of_a_file_may_be_absent() -> None:
    content = json.loads(byte_level().to_str())
    content["decoder"] = None
    tokenizer = Tokenizer(json.dumps(content).encode())
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)


# --------------------------------------------------------------------------- stop strings


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    search = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += search.feed(piece)
        if search.found is not None:
            return shown, search.found
    return shown + search.finish(), None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["Hello END there"], "Hello ", "END"),
        (["END"], ["Hello E", "N", "D there"], "Hello ", "END"),
        (["END"], ["Hello EN", "E", "N", "D"], "Hello EN", "END"),
        (["END"], ["Hello EN"], "Hello EN", None),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["bc", "abcd"], ["abcd"], "a", "bc"),
        (["bcd", "abcd"], ["abcd"], "", "abcd"),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo", "\n\n"),
        (["🎉"], ["a🎉b"], "a", "🎉"),
    ],
)
def test_stop_strings_are_found_across_cuts(
    stops: list[str], pieces: list[str], shown: str, found: str | None
) -> None:
    assert run(stops, pieces) == (shown, found)


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_cuts_change_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    shown, found = run(stops, pieces)
    assert (shown, found) == run(stops, list(text))
    if found is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + found)
        # It ends first: there is no stop string in what comes before its last character.
        assert not any(stop in (shown + found)[:-1] for stop in stops)


def test_possible_stop_string_is_held() -> None:
    search = StopStrings(["STOP"])
    assert search.feed("a S") == "a "
    assert search.feed("TO") == ""
    assert search.feed("x") == "STOx"
