"""Masks for the names of special tokens in clients' texts, so that no text becomes a special token.

A template writes special tokens by their names (`<|im_end|>`), and a client can write the same name into a
message. After rendering they look alike. So before rendering, a character that is in no text of the
conversation, the mask, is put into each name that a client wrote. The tokenizer takes names without a mask
for tokens, and drops the mask from the others: see `frontend/literal_encoding.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from dynamo_redis.errors import TemplateError

_MASKS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Characters that Unicode reserves for such uses within a program, and that are in no text."""


def names_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return an expression that finds the names of special tokens, the longest of those that begin at one
    place; None if there are no names. A name of one character cannot be masked, and is left out."""
    ordered = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class Masking:
    """The names of one model's special tokens."""

    def __init__(self, names: Iterable[str]) -> None:
        self._pattern = names_pattern(names)

    def is_needed(self, values: Sequence[Any]) -> bool:
        """Return whether a text in the values, or a list of parts together, has the name of a token."""
        return self._pattern is not None and any(map(self._pattern.search, _texts(values)))

    def mask_for(self, values: Sequence[Any]) -> str:
        """Return a character that is in no text of the values. Raises TemplateError if there is none."""
        left = set(_MASKS)
        for text in _texts(values):
            left.difference_update(text)
            if not left:
                raise TemplateError("the messages have all characters that Unicode reserves for programs")
        return min(left)

    def masked(self, value: Any, mask: str) -> Any:
        """Return a copy of a JSON value in which the mask stands behind the first character of each name, and
        between the parts of a message."""
        if isinstance(value, str):
            assert self._pattern is not None
            return self._pattern.sub(lambda found: found[0][0] + mask + found[0][1:], value)
        if isinstance(value, dict):
            return {self.masked(key, mask): self.masked(each, mask) for key, each in value.items()}
        if isinstance(value, list):
            copies = [self.masked(each, mask) for each in value]
            if len(_parts(value)) > 1:
                return [{**copy, "text": copy["text"] + mask} if _is_part(copy) else copy for copy in copies]
            return copies
        return value


def _texts(values: Any) -> Iterator[str]:
    """Yield the texts in JSON values, in any order. Takes no longer for values that are nested deeply."""
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending.extend(value)
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
            if len(parts := _parts(value)) > 1:
                yield "".join(parts)  # a template may write them without anything between them


def _parts(values: Iterable[Any]) -> list[str]:
    return [value["text"] for value in values if _is_part(value)]


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str)
