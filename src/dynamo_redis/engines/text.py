"""The text of the mock engine's answers: plain sentences, chosen by a hash, in the model's own tokens.

A `Phrasebook` is a fixed set of sentences, encoded once with the model's tokenizer. An answer is a sequence
of them that depends on one 64-bit key alone: the same key gives the same tokens in every process. Some
sentences have letters outside ASCII, since errors in streamed text show there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from xxhash import xxh3_64_intdigest

_OPENINGS = (
    "",
    "",
    "",
    "In short, ",
    "As a rule, ",
    "On a quiet evening ",
    "After a while ",
    "In the old harbour ",
    "Step by step ",
    "Strange as it sounds, ",
    "Every morning ",
    "Once again ",
)
_SUBJECTS = (
    "the river",
    "a patient gardener",
    "the night train",
    "an honest answer",
    "the clockmaker's daughter",
    "a small lighthouse",
    "the second draft",
    "the café on the corner",
    "a well-kept map",
    "the north wind",
    "a curious reader",
    "the last passenger",
    "the baker in the Grünstraße",
    "a long winter",
    "the library",
    "an old friend",
    "the orchestra",
    "a flock of cranes",
    "the watchful keeper",
    "a good question",
)
_PREDICATES = (
    "finds its way without a plan",
    "leaves a light on for those who arrive late",
    "turns a handful of words into a story",
    "keeps the time better than any tower",
    "waits at the bridge until the fog has lifted",
    "remembers what the letters left out",
    "carries salt, paper and two kinds of silence",
    "grows best where nobody hurries",
    "makes room for one more chair",
    "counts the steps and forgets the numbers",
    "opens a window before it opens a door",
    "teaches more than it says",
    "brings the scent of rain and of crème brûlée",
    "draws a line from the hill to the sea",
    "knows three songs and sings the fourth",
    "asks for nothing but a little patience",
    "mends what the storm has loosened",
    "arrives early and stays for tea",
    "answers slowly, and then all at once",
    "follows the stars as far as Reykjavík",
)
_ENDINGS = (
    ".",
    ".",
    ".",
    ", and that is enough.",
    ", which is why people come back.",
    "; the rest is habit.",
    ", even when the lamps are out.",
    ", as the proverb has it.",
    " — or so they say.",
    ", year after year.",
)

SENTENCE_COUNT = 256
_LEAST_SENTENCES, _MOST_SENTENCES = 2, 8


def sentences() -> list[str]:
    """Return all sentences of the phrasebook, in order."""
    texts = []
    for index in range(SENTENCE_COUNT):
        digest = xxh3_64_intdigest(index.to_bytes(4, "little"))
        parts = []
        for choices in (_OPENINGS, _SUBJECTS, _PREDICATES, _ENDINGS):
            digest, choice = divmod(digest, len(choices))
            parts.append(choices[choice])
        opening, subject, predicate, ending = parts
        text = f"{opening}{subject} {predicate}{ending}"
        texts.append(text[0].upper() + text[1:])
    return texts


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class TextEncoder(Protocol):
    """The part of `tokenizers.Tokenizer` that a phrasebook uses."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> _Encoding: ...


class Phrasebook:
    """The sentences as tokens of one tokenizer."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        texts = sentences()
        self._first = [tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
        self._later = [tuple(tokenizer.encode(f" {text}", add_special_tokens=False).ids) for text in texts]

    def length(self, key: int) -> int:
        """Return the number of tokens at which the answer of `key` ends by itself, after a whole sentence."""
        count = _LEAST_SENTENCES + key % (_MOST_SENTENCES - _LEAST_SENTENCES + 1)
        return sum(len(self._pick(key, index)) for index in range(count))

    def tokens(self, key: int) -> Iterator[int]:
        """Yield the tokens of the answer of `key`, without end: after its length more sentences follow."""
        index = 0
        while True:
            yield from self._pick(key, index)
            index += 1

    def _pick(self, key: int, index: int) -> tuple[int, ...]:
        choice = xxh3_64_intdigest(index.to_bytes(4, "little"), key) % SENTENCE_COUNT
        return self._later[choice] if index else self._first[choice]
