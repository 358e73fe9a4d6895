"""JSON values in a text that arrives in pieces: checked as they come, and written as strict JSON.

Source: RFC 8259. Models write line ends into strings as they are; these become escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from dynamo_redis.parsers.reader import CutOff, Malformed, Reader, Steps

MOST_HELD: Final = 1 << 18
"""The longest value, in characters, that is withheld until it is complete."""

_MOST_DEPTH: Final = 200
_LONGEST_SCALAR: Final = 1024

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE: Final = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_PARTIAL_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_SCALAR: Final = re.compile(r"[-+.0-9A-Za-z]*")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS: Final = ("true", "false", "null")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
"""Half of a character, as an escape may write it. It has no form in UTF-8, and stays an escape."""

Give = Callable[[str], None]


def pass_value(reader: Reader, give: Give) -> Steps[None]:
    """Read a JSON value and give its text as it comes. Raises Malformed where it breaks the format."""
    closers: list[str] = []
    reader.start = reader.position
    expects_value, may_close = True, False
    while True:
        character = yield from _next(reader, give)
        if may_close and character == closers[-1]:
            reader.position += 1
            closers.pop()
        elif not expects_value:  # after a value inside an object or array
            if character != ",":
                raise _malformed(reader, give)
            reader.position += 1
            if closers[-1] == "}":
                yield from _pass_key(reader, give)
            expects_value, may_close = True, False
            continue
        elif character in "{[":
            if len(closers) == _MOST_DEPTH:
                raise _malformed(reader, give)
            reader.position += 1
            closers.append("}" if character == "{" else "]")
            may_close = character == "[" or (yield from _next(reader, give)) == "}"
            if not may_close:
                yield from _pass_key(reader, give)
            continue
        elif character == '"':
            yield from _pass_string(reader, give)
        else:
            yield from _pass_scalar(reader, give)
        if not closers:
            _flush(reader, give)
            return
        expects_value, may_close = False, True


def value(reader: Reader, limit: int = MOST_HELD) -> Steps[str]:
    """Return the text of a JSON value of at most `limit` characters. Raises Malformed, at its beginning."""
    pieces: list[str] = []
    size = 0
    start = reader.position - reader.mark

    def hold(piece: str) -> None:
        nonlocal size
        size += len(piece)
        if size > limit:
            raise Malformed
        pieces.append(piece)

    try:
        yield from pass_value(reader, hold)
    except Malformed:
        reader.position = reader.mark + start
        raise
    return "".join(pieces)


def string(reader: Reader, limit: int) -> Steps[str]:
    """Return a JSON string, decoded. Raises Malformed, at its beginning."""
    if (first := (yield from reader.peek())) != '"':
        raise Malformed if first else CutOff
    text: str = json.loads((yield from value(reader, limit)))
    return text


def written(value: Any) -> str:
    """Return a value as JSON text that UTF-8 can write. Raises ValueError for a number that JSON lacks."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if _SURROGATE.search(text) else text


def object_text(text: str) -> str | None:
    """Return a text as JSON if it is an object, strict or with line ends in strings; else None."""
    try:
        found: Any = json.loads(text, strict=False)
        return written(found) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None


# --------------------------------------------------------------------------- parts of a value


def _flush(reader: Reader, give: Give) -> None:
    """Give the text that has been read."""
    if reader.position > reader.start:
        text = reader.buffer[reader.start : reader.position]
        reader.start = reader.position
        give(text)


def _malformed(reader: Reader, give: Give) -> Malformed:
    """Give the text before an error, and return the error."""
    _flush(reader, give)
    return Malformed()


def _more(reader: Reader, give: Give) -> Steps[None]:
    """Give the text so far and wait for more. Raises Malformed if it has ended."""
    _flush(reader, give)
    yield from reader.more()


def _next(reader: Reader, give: Give) -> Steps[str]:
    """Read past white space. Return the next character, which is not read."""
    while True:
        match = _SPACE.match(reader.buffer, reader.position)
        assert match is not None
        reader.position = match.end()
        if reader.position < len(reader.buffer):
            return reader.buffer[reader.position]
        yield from _more(reader, give)


def _pass_key(reader: Reader, give: Give) -> Steps[None]:
    if (yield from _next(reader, give)) != '"':
        raise _malformed(reader, give)
    yield from _pass_string(reader, give)
    if (yield from _next(reader, give)) != ":":
        raise _malformed(reader, give)
    reader.position += 1


def _pass_string(reader: Reader, give: Give) -> Steps[None]:
    reader.position += 1
    while True:
        match = _PLAIN.match(reader.buffer, reader.position)
        assert match is not None
        reader.position = match.end()
        if reader.position == len(reader.buffer):
            yield from _more(reader, give)
            continue
        character = reader.buffer[reader.position]
        if character == '"':
            reader.position += 1
            return
        if character == "\\":
            escape = _ESCAPE.match(reader.buffer, reader.position)
            if escape is not None:
                reader.position = escape.end()
            elif _PARTIAL_ESCAPE.fullmatch(reader.buffer, reader.position):
                yield from _more(reader, give)
            else:
                raise _malformed(reader, give)
        else:  # a control character
            _flush(reader, give)
            reader.position = reader.start = reader.position + 1
            give(json.dumps(character)[1:-1])


def _pass_scalar(reader: Reader, give: Give) -> Steps[None]:
    """Read a number or a word. It is given whole, since its end is known only from what follows."""
    while True:
        match = _SCALAR.match(reader.buffer, reader.position, reader.position + _LONGEST_SCALAR + 1)
        assert match is not None
        size = len(match.group())
        if not 0 < size <= _LONGEST_SCALAR:
            raise _malformed(reader, give)
        if match.end() < len(reader.buffer) or reader.ended:
            break
        _flush(reader, give)
        yield
    if match.group() not in _WORDS and not _NUMBER.fullmatch(match.group()):
        if match.end() == len(reader.buffer):  # the text ends within a word or a number
            yield from _more(reader, give)
        raise _malformed(reader, give)
    reader.position += size
