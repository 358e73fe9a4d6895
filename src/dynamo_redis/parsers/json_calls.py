"""Tool formats whose calls are JSON objects with a name and arguments, after a marker or without one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from typing import Final

from dynamo_redis.parsers.calls import LONGEST_NAME, Calls, ToolFormat
from dynamo_redis.parsers.json_text import object_text, pass_value, string, value
from dynamo_redis.parsers.reader import CutOff, Malformed, Reader, Steps

_ARGUMENTS: Final = ("arguments", "parameters")
_SURPLUS: Final = re.compile(r"[\s}\]]*")


def json_format(*begin: str, end: str = "", bare: str = "") -> ToolFormat:
    """Return the format of calls in JSON, one or many, after one of some markers."""
    return ToolFormat(begin, partial(_read_calls, end), bare, (end,) if end else ())


def _read_calls(end: str, reader: Reader, calls: Calls, _: str) -> Steps[None]:
    yield from reader.skip_space()
    count = calls.count
    try:
        if (yield from reader.peek()) == "[":
            yield from read_list(reader, calls)
        else:
            yield from _read_sequence(reader, calls)
    except Malformed as exc:
        if calls.is_open or calls.count == count or (reader.is_cut and isinstance(exc, CutOff)):
            raise
    reader.position = reader.mark
    if end:  # models often write one brace too few, or too many
        yield from reader.skip(_SURPLUS)
        yield from reader.close(end)


def read_list(reader: Reader, calls: Calls) -> Steps[None]:
    """Read a list of calls. Raises Malformed."""
    yield from reader.expect("[")
    while True:
        yield from reader.skip_space()
        yield from _read_call(reader, calls)
        yield from reader.skip_space()
        if not (yield from reader.optional(",")):
            break
    yield from reader.expect("]")
    reader.drop()


def _read_sequence(reader: Reader, calls: Calls) -> Steps[None]:
    """Read calls one after another, with or without separators."""
    while True:
        yield from _read_call(reader, calls)
        yield from reader.skip_space()
        if is_separated := (yield from reader.peek()) in (";", ","):
            reader.position += 1
            yield from reader.skip_space()
        if (character := (yield from reader.peek())) != "{":
            if is_separated and not character:
                raise CutOff
            return


def _read_call(reader: Reader, calls: Calls) -> Steps[None]:
    """Read an object with a name and arguments, in any order. Other members have no meaning here."""
    yield from reader.expect("{")
    name, held, has_begun = "", "", False
    while True:
        yield from reader.skip_space()
        key = yield from string(reader, LONGEST_NAME)
        yield from reader.skip_space()
        yield from reader.expect(":")
        yield from reader.skip_space()
        if key == "name" and not name:
            name = yield from string(reader, LONGEST_NAME)
        elif key in _ARGUMENTS and name and not held and not has_begun:
            has_begun = True
            yield from read_arguments(reader, calls, name)
        elif key in _ARGUMENTS and not held and not has_begun:
            held = _as_object((yield from value(reader)))
        else:
            yield from value(reader)
        yield from reader.skip_space()
        if not (yield from reader.optional(",")):
            break
    yield from reader.expect("}")
    if has_begun:
        reader.drop()
    elif held or not calls.only_tools:  # without a marker, an object with nothing but a name is no call
        give_call(calls, name, held or "{}")
    else:
        raise Malformed


def read_arguments(reader: Reader, calls: Calls, name: str, call_id: str | None = None) -> Steps[None]:
    """Read the arguments of a call: an object, the text of one in a string, or null."""
    if (yield from reader.peek()) == "{":
        calls.begin(name, call_id)
        yield from pass_value(reader, calls.arguments)
        calls.end()
    else:
        give_call(calls, name, _as_object((yield from value(reader))), call_id)


def give_call(calls: Calls, name: str, arguments: str, call_id: str | None = None) -> None:
    """Give a whole call. Raises Malformed if there cannot be one of this name."""
    calls.begin(name, call_id)
    calls.arguments(arguments)
    calls.end()


def _as_object(text: str) -> str:
    """Return arguments that were withheld as a JSON object. Raises Malformed."""
    if text == "null":
        return "{}"
    found = object_text(json.loads(text)) if text.startswith('"') else text
    if found is None or not found.startswith("{"):
        raise Malformed
    return found


# --------------------------------------------------------------------------- chosen calls


def chosen_format(own: ToolFormat | None, name: str | None) -> ToolFormat:
    """Return the format of an answer that is bound to call a tool: by guided decoding the arguments of the
    function `name`, or a list of calls if that is None; or calls in the model's `own` format."""
    bare = "[" if name is None else "{"

    def read(reader: Reader, calls: Calls, marker: str) -> Steps[None]:
        if own is not None and (marker or (yield from reader.peek()) != bare):
            yield from own.read(reader, calls, marker)
        elif name is None:
            yield from read_list(reader, calls)
        else:
            yield from read_arguments(reader, calls, name)

    if own is None:
        return ToolFormat((), read, bare, is_bound=True)
    return replace(own, read=read, bare=bare + own.bare, is_bound=True)
