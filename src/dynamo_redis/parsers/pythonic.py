"""The pythonic tool format: a list of calls as in Python, `[name(key=value, …), …]`."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any, Final

from dynamo_redis.parsers.calls import LONGEST_NAME, Calls, ToolFormat
from dynamo_redis.parsers.json_calls import give_call
from dynamo_redis.parsers.json_text import MOST_HELD, written
from dynamo_redis.parsers.reader import Malformed, Reader, Steps

_MOST_DEPTH: Final = 50
_NAME: Final = re.compile(r"[^\W\d][\w.-]*")
_PLAIN: Final = {
    "": re.compile(r"[^\"'()\[\]{}\\#]*"),
    "'": re.compile(r"[^'\\]*"),
    '"': re.compile(r'[^"\\]*'),
}
"""The characters that change nothing, outside of a string and in one with this quote."""
_CLOSERS: Final = {"(": ")", "[": "]", "{": "}"}
_BEGIN: Final = "<|python_start|>"
_END: Final = "<|python_end|>"


def _read_calls(reader: Reader, calls: Calls, marker: str) -> Steps[None]:
    yield from reader.skip_space()
    yield from reader.expect("[")
    while True:
        yield from reader.skip_space()
        name, _ = yield from reader.until(("(",), LONGEST_NAME)
        if not _NAME.fullmatch(name):
            raise Malformed
        text = yield from _arguments_text(reader)
        give_call(calls, name, _as_json(text))
        yield from reader.skip_space()
        if not (yield from reader.optional(",")):
            break
    yield from reader.expect("]")
    reader.drop()
    if marker:
        yield from reader.skip_space()
        if (yield from reader.optional(_END)):
            reader.drop()
        else:
            reader.position = reader.mark


PYTHONIC: Final = ToolFormat((_BEGIN,), _read_calls, bare="[", markers=(_END,))


def _arguments_text(reader: Reader) -> Steps[str]:
    """Return the text up to the bracket that closes a call, which is read. Raises Malformed, at its
    beginning."""
    start = reader.position - reader.mark
    closers = [")"]
    quote = ""
    try:
        while closers:
            match = _PLAIN[quote].match(reader.buffer, reader.position)
            assert match is not None
            reader.position = match.end()
            if reader.position - reader.mark - start > MOST_HELD:
                raise Malformed
            if reader.position == len(reader.buffer):
                yield from reader.more()
                continue
            character = reader.buffer[reader.position]
            if character == "\\" and quote:
                while reader.position + 1 == len(reader.buffer):
                    yield from reader.more()
                reader.position += 1
            elif quote:
                quote = "" if character == quote else quote
            elif character in "\"'":
                quote = character
            elif character in _CLOSERS and len(closers) < _MOST_DEPTH:
                closers.append(_CLOSERS[character])
            elif character == closers[-1]:
                closers.pop()
            else:
                raise Malformed
            reader.position += 1
    except Malformed:
        reader.position = reader.mark + start
        raise
    begin = reader.mark + start
    return reader.buffer[begin : reader.position - 1]


def _as_json(text: str) -> str:
    """Return keyword arguments as a JSON object. Raises Malformed if they are no literals."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(f"f({text}\n)", mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Malformed from None
    call = tree.body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise Malformed
    try:
        arguments = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        if None in arguments:
            raise Malformed
        return written(arguments)
    except (ValueError, TypeError, RecursionError):
        raise Malformed from None


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal. The names of JSON's words are literals, too."""
    match node:
        case ast.Name(id="true"):
            return True
        case ast.Name(id="false"):
            return False
        case ast.Name(id="null"):
            return None
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case _:
            return ast.literal_eval(node)


def _key(node: ast.expr | None) -> str:
    key = None if node is None else ast.literal_eval(node)
    if not isinstance(key, str):
        raise TypeError("a key that is no text")
    return key
