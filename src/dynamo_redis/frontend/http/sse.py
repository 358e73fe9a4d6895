"""Server-sent events, and the JSON in them.

Pure. Source of the format: the WHATWG HTML standard, section 9.2 "Server-sent events".
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

DONE = b"data: [DONE]\n\n"

_LINE_SEPARATORS = frozenset("\x85\u2028\u2029")
"""Line ends in Unicode, but not in server-sent events: clients that split lines by Unicode break at them."""

ascii_json = json.JSONEncoder(separators=(",", ":")).encode
"""Encodes compact JSON in ASCII."""

unicode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Encodes compact JSON."""


def event(value: Any) -> bytes:
    """Return an event that carries a JSON value."""
    return f"data: {ascii_json(value)}\n\n".encode()


def named_event(name: str, value: Any) -> bytes:
    """Return an event with a name that carries a JSON value."""
    return f"event: {name}\ndata: {ascii_json(value)}\n\n".encode()


def escape(text: str) -> bytes:
    """Return text as a JSON string."""
    if text.isascii() or _LINE_SEPARATORS.isdisjoint(text):
        return encode_basestring(text).encode(errors="replace")
    return encode_basestring_ascii(text).encode()
