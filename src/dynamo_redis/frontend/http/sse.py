"""Server-sent events of a streamed completion: a constant frame around a JSON-escaped delta.

Pure. Source of the format: the WHATWG HTML standard, section 9.2 "Server-sent events".
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, Literal

DONE = b"data: [DONE]\n\n"

Kind = Literal["chat", "text"]

_LINE_SEPARATORS = frozenset("\x85\u2028\u2029")
"""Line ends in Unicode, but not in server-sent events: clients that split lines by Unicode break at them."""

_ascii = json.JSONEncoder(separators=(",", ":")).encode
_unicode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(value: Any) -> bytes:
    """Return an event that carries a JSON value."""
    return f"data: {_ascii(value)}\n\n".encode()


def escape(text: str) -> bytes:
    """Return text as a JSON string."""
    if text.isascii() or _LINE_SEPARATORS.isdisjoint(text):
        return encode_basestring(text).encode(errors="replace")
    return encode_basestring_ascii(text).encode()


_CONTENT: dict[Kind, bytes] = {"chat": b'"delta":{"content":', "text": b'"text":'}
_AFTER: dict[Kind, bytes] = {
    "chat": b'},"finish_reason":null,"logprobs":null}]}\n\n',
    "text": b',"finish_reason":null,"logprobs":null}]}\n\n',
}
_BEGIN = b'"delta":{"role":"assistant","content":""},"finish_reason":null,"logprobs":null}]}\n\n'
_END: dict[Kind, bytes] = {"chat": b'"delta":{},"finish_reason":', "text": b'"text":"","finish_reason":'}
_AFTER_REASON = b',"logprobs":null}]}\n\n'


class ChunkEncoder:
    """Encodes the chunks of one choice of a streamed completion.

    The frame around a delta is made once. A chunk is then two concatenations and an escape: 0.2 µs, against
    20 µs for serializing a model of it.
    """

    __slots__ = ("_after", "_before", "_kind", "_start")

    def __init__(self, kind: Kind, frame: dict[str, Any], index: int, *, includes_usage: bool) -> None:
        """`frame` has the constant fields (id, object, created, model); `index` is the choice's."""
        fields = _unicode(frame)[1:-1]
        usage = '"usage":null,' if includes_usage else ""
        start = f'data: {{{fields},{usage}"choices":[{{"index":{index},'
        self._kind = kind
        self._start = start.encode(errors="replace")
        self._before = self._start + _CONTENT[kind]
        self._after = _AFTER[kind]

    def begin(self) -> bytes:
        """Return the chunk before the first delta: the role, for a chat; else nothing."""
        return b"" if self._kind == "text" else self._start + _BEGIN

    def delta(self, text: str) -> bytes:
        """Return the chunk of a piece of the answer."""
        return self._before + escape(text) + self._after

    def end(self, finish_reason: str) -> bytes:
        """Return the choice's last chunk, with the finish reason."""
        return self._start + _END[self._kind] + escape(finish_reason) + _AFTER_REASON
