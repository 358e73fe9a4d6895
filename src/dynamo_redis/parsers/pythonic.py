"""The pythonic tool format: a list of calls as in Python, `[name(key=value, …), …]`."""

from __future__ import annotations

import re
from typing import Final

from dynamo_redis.parsers.calls import LONGEST_NAME, Calls, ToolFormat
from dynamo_redis.parsers.json_calls import give_call
from dynamo_redis.parsers.json_text import written
from dynamo_redis.parsers.python_text import Literals
from dynamo_redis.parsers.reader import CutOff, Malformed, Reader, Steps

_NAME: Final = re.compile(r"[^\W\d][\w.-]*")
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
        give_call(calls, name, (yield from _arguments(reader)))
        yield from reader.skip_space()
        if not (yield from reader.optional(",")):
            break
    yield from reader.expect("]")
    reader.drop()
    if marker:
        yield from reader.skip_space()
        yield from reader.close(_END)


PYTHONIC: Final = ToolFormat((_BEGIN,), _read_calls, bare="[", markers=(_END,))


def _arguments(reader: Reader) -> Steps[str]:
    """Return the keyword arguments up to the bracket that closes a call, which is read, as a JSON object.
    Raises Malformed, at their beginning."""
    start = reader.position - reader.mark
    try:
        return written((yield from Literals(reader).keywords()))
    except (Malformed, ValueError) as exc:  # it may be a number that JSON lacks
        reader.position = reader.mark + start
        raise (CutOff if isinstance(exc, CutOff) else Malformed) from None
