"""Requests, answers and errors as HTTP carries them. Pure.

JSON in, JSON lines out: each item is a line, empty lines mean nothing, and an error behind the first item is
a last line `{"error": {…}}`. `bytes` become base64 text, an extension value `[type, base64 text]`.

MessagePack in, MessagePack out: the items one behind the other, then an extension value of type `END_TYPE`:
empty, or the packed error `[code, message, details]`. Empty ones of type `BEAT_TYPE` mean nothing.

An error before the first item is a problem document (RFC 9457) with the code that every plane uses.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import Any, Final

import msgpack

from dynamo_redis.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    EndpointNotFound,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    PlaneError,
    RequestCancelled,
    plane_error,
)
from dynamo_redis.wire.codec import pack, unpack

JSON: Final = "application/json"
JSON_LINES: Final = "application/x-ndjson"
MSGPACK: Final = "application/msgpack"
PROBLEM: Final = "application/problem+json"
END_TYPE: Final = -2
"""A type that MessagePack reserves, so no item can have it."""
UNPACK_ERRORS: Final = (ValueError, msgpack.UnpackException, TypeError, MemoryError)
"""The errors of unpackers for bytes that are not MessagePack; TypeError: a map or an array as a key."""

BEAT_TYPE: Final = -3
MSGPACK_BEAT: Final = b"\xc7\x00\xfd"
"""An empty extension value of `BEAT_TYPE`: no item, the answer goes on."""

_MSGPACK_TYPES: Final = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})
_JSON_TYPES: Final = frozenset({JSON, JSON_LINES, "", "application/x-www-form-urlencoded"})
"""With the type that `curl --data` gives."""
_STATUS: Final[tuple[tuple[type[PlaneError], int], ...]] = (
    (AuthenticationFailed, 401),
    (EndpointNotFound, 404),
    (PayloadTooLarge, 413),
    (InvalidRequest, 400),
    (RequestCancelled, 499),
    (DeadlineExceeded, 504),
)
_LONGEST_RETRY_S: Final = 3600.0
_EXT_32: Final = 0xC9
_MAX_TEXT_CHARS: Final = 4096
_MAX_READ_BYTES: Final = 17 << 20
"""The most bytes of one read: the window of a connection."""


def is_msgpack(content_type: str) -> bool | None:
    """Return True for MessagePack, False for JSON, and None for any other content type."""
    name = content_type.partition(";")[0].strip().lower()
    if name in _MSGPACK_TYPES:
        return True
    return False if name in _JSON_TYPES else None


def read_json(body: bytes) -> Any:
    """Read a request in JSON; an empty body is null. Raises InvalidRequest."""
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"the body is not JSON: {exc}") from exc


def read_msgpack(body: bytes) -> Any:
    """Read a request in MessagePack. Raises InvalidRequest."""
    try:
        return unpack(body)
    except ValueError as exc:
        raise InvalidRequest(f"the body is not one MessagePack value: {exc}") from exc


def json_lines(items: list[Any]) -> bytes:
    """Write items as JSON lines. Raises TypeError and ValueError for an item that JSON cannot carry."""
    try:
        return "".join(
            [json.dumps(item, separators=(",", ":"), default=_to_json) + "\n" for item in items]
        ).encode()
    except RecursionError as exc:
        raise ValueError("an item nests too deep") from exc


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} is no JSON")


def status_of(error: PlaneError) -> int:
    """Return the HTTP status of an error."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return 503 if error.retryable else 500


def details_of(error: PlaneError) -> dict[str, Any] | None:
    """Return what an error says beside its message."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else None
    if retry_after_s is None or not 0 <= retry_after_s < _LONGEST_RETRY_S:
        return None
    return {"retry_after_ms": round(retry_after_s * 1000)}


def problem(error: PlaneError) -> dict[str, Any]:
    """Return an error as a problem document."""
    return {
        "type": "about:blank",
        "title": error.code.replace("_", " ").capitalize(),
        "status": status_of(error),
        "detail": str(error),
        "code": error.code,
        **(details_of(error) or {}),
    }


def msgpack_end(error: PlaneError | None = None) -> bytes:
    """Write the end of an answer in MessagePack."""
    ending = b"" if error is None else pack([error.code, str(error)[:_MAX_TEXT_CHARS], details_of(error)])
    return struct.pack(">BIb", _EXT_32, len(ending), END_TYPE) + ending


class End:
    """The end of an answer in MessagePack, as `new_answer_unpacker` returns it."""

    def __init__(self, content: bytes) -> None:
        self.content = content


BEAT: Final = object()
"""A sign between items, as `new_answer_unpacker` returns it."""


def new_answer_unpacker(max_item_bytes: int) -> msgpack.Unpacker:
    """Make an unpacker of the items of an answer, and its `End`. It raises `UNPACK_ERRORS`."""

    def read_extension(code: int, data: bytes) -> Any:
        if code == END_TYPE:
            return End(data)
        return BEAT if code == BEAT_TYPE else msgpack.ExtType(code, data)

    return msgpack.Unpacker(
        max_buffer_size=max_item_bytes + _MAX_READ_BYTES,
        strict_map_key=False,
        timestamp=1,
        ext_hook=read_extension,
    )


def read_end(content: bytes) -> PlaneError | None:
    """Read the end of an answer. Raises ValueError."""
    if not content:
        return None
    ending = unpack(content)
    if not isinstance(ending, list) or len(ending) != 3 or not all(type(part) is str for part in ending[:2]):
        raise ValueError("a malformed end of an answer")
    return read_error(ending[0], ending[1], ending[2])


def read_error(code: str, message: str, details: Any) -> PlaneError:
    """Return the error that a peer reported."""
    error = plane_error(code, message)
    if isinstance(error, Overloaded) and isinstance(details, dict):
        retry_after_ms = details.get("retry_after_ms")
        if type(retry_after_ms) is int and retry_after_ms >= 0:
            error.retry_after_s = min(retry_after_ms, _LONGEST_RETRY_S * 1000) / 1000
    return error


def read_problem(status: int, body: bytes) -> PlaneError:
    """Return the error of an answer without items; a proxy may have written it."""
    try:
        found = json.loads(body)
        return read_error(found["code"], found["detail"], found)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
        if status == 404:
            return EndpointNotFound(f"HTTP 404 of a server that is no worker, or of a proxy: {text}")
        if status in (502, 503, 504):
            return Overloaded(f"HTTP {status} of a proxy: {text}")
        return PlaneError(f"HTTP {status}: {text}")
