"""Python's literals in a text that arrives in pieces, as values of JSON.

Source: "Lexical analysis" and "Expressions" of Python's reference. Python's own parser needs the whole text,
and takes 0.3 s for 200,000 characters. Here each step takes a time in proportion to its piece. The step that
ends a string takes a time in proportion to the string, which has `MOST_HELD` characters at most.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any, Final

from dynamo_redis.parsers.json_text import MOST_HELD
from dynamo_redis.parsers.reader import Malformed, Reader, Steps

_MOST_DEPTH: Final = 50
_LONGEST_WORD: Final = 1024

_WORD: Final = re.compile(r"[-+.\w]*")
_INTEGER: Final = re.compile(r"[-+]?(?:[0-9][0-9_]*|0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+)")
_FLOAT: Final = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9_]+)?")
_PLAIN: Final = {"'": re.compile(r"[^'\\]*"), '"': re.compile(r'[^"\\]*')}
_SPECIAL: Final = re.compile(r"""[\\'"\r\n]""")
"""Characters in a string that may not stand for themselves."""
_STRING_BEGINS: Final = "'\"rRuU"
_WORDS: Final = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}


class Literals:
    """Reads literals, up to `MOST_HELD` characters in all. Each step raises Malformed at another text."""

    def __init__(self, reader: Reader) -> None:
        """Read from the reader's position on."""
        self._reader = reader
        self._start = reader.position - reader.mark

    def keywords(self) -> Steps[dict[str, Any]]:
        """Return the values of keyword arguments, by their names, up to the bracket behind them, which is
        read."""
        reader = self._reader
        found: dict[str, Any] = {}
        while True:
            yield from reader.skip_space()
            if (yield from reader.optional(")")):
                return found
            name = yield from self._word()
            yield from reader.skip_space()
            yield from reader.expect("=")
            if not name.isidentifier() or name in found:
                raise Malformed
            found[name] = yield from self._value(1)
            if not (yield from self._has_more(")")):
                return found

    def _value(self, depth: int) -> Steps[Any]:
        reader = self._reader
        self._check_size()
        if depth > _MOST_DEPTH:
            raise Malformed
        yield from reader.skip_space()
        character = yield from reader.peek()
        if not character:
            yield from reader.more()
        if character in _STRING_BEGINS:
            return (yield from self._strings())
        if character == "{":
            return (yield from self._dict(depth))
        if character == "[":
            items, _ = yield from self._items("]", depth)
            return items
        if character == "(":
            items, is_tuple = yield from self._items(")", depth)
            return items if is_tuple or not items else items[0]
        return _scalar((yield from self._word()))

    def _items(self, closer: str, depth: int) -> Steps[tuple[list[Any], bool]]:
        """Return the values between brackets, and whether there is a comma."""
        reader = self._reader
        reader.position += 1
        items: list[Any] = []
        has_comma = False
        while True:
            yield from reader.skip_space()
            if (yield from reader.optional(closer)):
                return items, has_comma
            items.append((yield from self._value(depth + 1)))
            if not (yield from self._has_more(closer)):
                return items, has_comma
            has_comma = True

    def _dict(self, depth: int) -> Steps[dict[str, Any]]:
        reader = self._reader
        reader.position += 1
        found: dict[str, Any] = {}
        while True:
            yield from reader.skip_space()
            if (yield from reader.optional("}")):
                return found
            key = yield from self._strings()
            yield from reader.skip_space()
            yield from reader.expect(":")
            found[key] = yield from self._value(depth + 1)
            if not (yield from self._has_more("}")):
                return found

    def _has_more(self, closer: str) -> Steps[bool]:
        """Read past a comma, or past the closing bracket. Return whether it was a comma."""
        yield from self._reader.skip_space()
        return (yield from self._reader.one_of(",", closer)) == ","

    def _strings(self) -> Steps[str]:
        """Return the text of one string, or of several side by side."""
        texts = [(yield from self._string())]
        while True:
            yield from self._reader.skip_space()
            character = yield from self._reader.peek()
            if not character or character not in _STRING_BEGINS:
                return "".join(texts)
            self._check_size()
            texts.append((yield from self._string()))

    def _string(self) -> Steps[str]:
        reader = self._reader
        start = reader.position - reader.mark
        quote = yield from reader.peek()
        if quote not in _PLAIN:
            reader.position += 1  # a prefix
            quote = yield from reader.peek()
        if quote not in _PLAIN:
            raise Malformed
        reader.position += 1
        end = quote * 3 if (yield from reader.optional(quote * 2)) else quote
        while not (yield from reader.optional(end)):
            self._check_size()
            character = yield from reader.peek()
            if not character:
                yield from reader.more()
            elif character == "\\":
                reader.position += 1
                if not (yield from reader.peek()):
                    yield from reader.more()
                reader.position += 1
            elif character == quote:  # one or two of three
                reader.position += 1
            else:
                match = _PLAIN[quote].match(reader.buffer, reader.position)
                assert match is not None
                reader.position = match.end()
        self._check_size()
        return _text(reader.buffer[reader.mark + start : reader.position])

    def _word(self) -> Steps[str]:
        """Return the letters, digits and signs up to another character."""
        reader = self._reader
        while True:
            match = _WORD.match(reader.buffer, reader.position, reader.position + _LONGEST_WORD + 1)
            assert match is not None
            if len(match.group()) > _LONGEST_WORD:
                raise Malformed
            if match.end() < len(reader.buffer) or reader.ended:
                reader.position = match.end()
                return match.group()
            yield

    def _check_size(self) -> None:
        if self._reader.position - self._reader.mark - self._start > MOST_HELD:
            raise Malformed


def _scalar(word: str) -> Any:
    """Return the value of a name or a number. The names of JSON's words are literals, too."""
    if word in _WORDS:
        return _WORDS[word]
    try:
        if _INTEGER.fullmatch(word):
            return int(word, 0)
        if _FLOAT.fullmatch(word):
            return float(word)
    except ValueError:  # such as 01, and 1__0
        pass
    raise Malformed


def _text(token: str) -> str:
    """Return the text of a string."""
    inside = token[1:-1]
    if token[0] in _PLAIN and not _SPECIAL.search(inside):
        return inside
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            text: str = ast.literal_eval(token)
    except (SyntaxError, ValueError, MemoryError):
        raise Malformed from None
    return text
