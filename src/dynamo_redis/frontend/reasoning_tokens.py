"""Counts the tokens of an answer's reasoning.

Reasoning is at the beginning of an answer only. So its tokens are all up to the one that completes the marker
of its end, both markers included, as Anthropic counts them. An answer that ends before is reasoning as a
whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Final

from dynamo_redis.parsers.reasoning import ReasoningFormat

_DECODER: Final = codecs.getincrementaldecoder("utf-8")
"""Holds back the beginning of a character whose other bytes are in further tokens."""


class ReasoningTokens:
    """The tokens of one answer's reasoning. Tokens are looked at one by one, until the reasoning is over."""

    __slots__ = (
        "_begin",
        "_decode",
        "_end",
        "_is_inside",
        "_is_over",
        "_other",
        "_seen_count",
        "_starts_inside",
        "_text",
        "_token_bytes",
    )

    def __init__(
        self,
        markers: ReasoningFormat,
        token_bytes: Callable[[int], bytes],
        *,
        starts_inside: bool = False,
        other: str = "",
    ) -> None:
        """`token_bytes` returns the text of a token; `starts_inside` says that the answer begins with
        reasoning, without its marker. An answer whose first character is one of `other` has none."""
        self._begin, self._end = markers.begin, markers.end
        self._token_bytes = token_bytes
        self._starts_inside = starts_inside
        self._other = other
        self.restart()

    def restart(self) -> None:
        """Forget all tokens: another worker answers from the beginning."""
        self._seen_count = 0
        self._text = ""
        self._decode = _DECODER("replace").decode
        self._is_inside = self._is_over = False

    @property
    def count(self) -> int:
        """The number of tokens so far."""
        return self._seen_count if self._is_inside or (self._starts_inside and not self._is_over) else 0

    def feed(self, token_ids: Iterable[int]) -> None:
        """Take the next tokens of the answer. Raises an error for what is no token id of the model."""
        if self._is_over:
            return
        for token_id in token_ids:
            self._seen_count += 1
            self._text += self._decode(self._token_bytes(token_id))
            if not self._is_inside:
                self._begin_reasoning()
            if self._is_inside:
                self._is_over = self._end in self._text
                self._text = self._text[1 - len(self._end) :]
            if self._is_over:
                return

    def _begin_reasoning(self) -> None:
        """Decide whether the answer begins with reasoning, as soon as its text says so."""
        self._text = text = self._text.lstrip()
        if not text:
            return
        if text[0] in self._other:
            self._is_over = True
        elif text.startswith(self._begin):
            self._is_inside, self._text = True, text[len(self._begin) :]
        elif not self._begin.startswith(text):
            self._is_inside = self._starts_inside
            self._is_over = not self._starts_inside
