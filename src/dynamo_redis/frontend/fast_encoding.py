"""Encoding of texts by `fastokens`, where it is found to give the same tokens as `tokenizers`: ten times as
fast.

`fastokens` does not implement every normalizer and pre-tokenizer of `tokenizers`. So each model's encoder is
compared with the other one on some thousand texts before it is used.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from dynamo_redis.errors import ModelError

_MATCH_LIMIT: Final = 1_000_000
"""Steps that a regular expression may take for one match. Expressions of models take less than a hundred; one
that takes any number fails here, and its text goes to `tokenizers`."""

_PROBE_COUNT: Final = 1500
_PIECES: Final = (
    " ", "  ", "\n", "\r\n", "\t", "   \n  ", "\u00a0", "\u3000", "\u200b", "\u2028", "\x00",
    "\x7f", "\ufeff", "the", " The", "don't", "I'LL", "we've", "'s", "x_y", "CamelCase", "naïve",
    "Straße", "ﬁn", "İstanbul", "e\u0301", "\u0301", "Å", "한국어", "\u1112\u1161\u11ab", "日本語",
    "漢字かな", "ไทย", "हिन्दी", "עברית", "العربية", "Привет", "ΑΒΓ", "👩‍👩‍👧", "🇩🇪", "😀", "\ufffd",
    "\U00010348", "1", "12", "1234567890", "3.14", "٣", "²", "Ⅳ", "½", "!", "?!", "...", "--", "=>",
    "/*", "<", ">", "</s>", "{", "}}", "[0]", "\\n", '"', "``", "http://a.b/c?d=e&f",
    "def f(x):\n    return x\n", "a" * 40, "0" * 40, " " * 40, "\n" * 7, "-" * 30,
)  # fmt: skip

Encode = Callable[[str, bool], list[int]]
"""Returns the tokens of a text, with or without the special tokens of the file's post-processor."""


class FastEncoder:
    """A tokenizer's encoder. May be used from several threads."""

    def __init__(self, content: bytes) -> None:
        """Load the content of a `tokenizer.json`. Blocks for some seconds.

        Raises ModelError if `fastokens` is not installed, or does not support the file.
        """
        try:
            import fastokens
        except ImportError as exc:
            raise ModelError("fastokens is not installed") from exc
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(
                content.decode(), pcre2_match_limit=_MATCH_LIMIT
            )
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # noqa: BLE001 - a panic of the library is not an Exception
            raise ModelError(f"fastokens does not support it: {str(exc).splitlines()[0]}") from None

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """Return the tokens of a text; None if it fails at the text."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001 - see above
            return None
        return ids

    def check(self, encode: Encode, added_tokens: Sequence[str]) -> None:
        """Compare with another encoder. Blocks for a second. Raises ModelError at a difference."""
        for text in probe_texts(added_tokens):
            for add_special_tokens in (False, True):
                if self.encode(text, add_special_tokens) != encode(text, add_special_tokens):
                    raise ModelError(f"fastokens gives other tokens for the text {text!r}")


def probe_texts(added_tokens: Sequence[str]) -> Iterator[str]:
    """Yield texts in which encoders may differ: scripts, spaces, digits, contractions, added tokens within
    text, and random characters. The same at each call."""
    rng = random.Random(0)  # noqa: S311 - texts, no secret
    yield from ("", *_PIECES, *added_tokens[:1000])
    added = added_tokens or ("",)
    for _ in range(_PROBE_COUNT):
        pieces: list[str] = []
        for _ in range(rng.randint(1, 12)):
            draw = rng.random()
            if draw < 0.6:
                pieces.append(rng.choice(_PIECES))
            elif draw < 0.7:
                pieces.append(rng.choice(added))
            elif draw < 0.75:
                pieces.append(rng.choice(added)[:-1])
            elif draw < 0.9:
                pieces.append("".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(1, 12))))
            else:
                pieces.append("".join(_random_characters(rng, rng.randint(1, 6))))
        yield rng.choice(("", " ")).join(pieces)


def _random_characters(rng: random.Random, count: int) -> Iterator[Any]:
    """Yield characters of any kind but surrogates, which no text in UTF-8 has."""
    while count:
        character = chr(rng.choice((rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(0x110000))))
        if unicodedata.category(character) != "Cs":
            count -= 1
            yield character
