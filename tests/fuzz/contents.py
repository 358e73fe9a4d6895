"""Contents of the http plane and of tunnels, read from any bytes: a value, or the error that is documented.

Each check also holds a round trip: what is read is written and read again, and an answer is compared with a
second reader, however its bytes are split.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

import msgpack
from hypothesis import event, given
from hypothesis import strategies as st

from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import (
    AuthenticationFailed,
    ConnectionLost,
    InvalidRequest,
    Overloaded,
    PlaneError,
    ProtocolViolation,
)
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.http import content, token
from dynamo_redis.planes.tcp.server import TcpServer
from dynamo_redis.runtime.service import Service, read_answer
from dynamo_redis.wire import tunnel
from dynamo_redis.wire.codec import pack
from tests.fuzz import reference
from tests.fuzz.rounds import Property
from tests.fuzz.streams import WELL_FORMED, Edit, Long, assemble, edits, scalars, splits
from tests.rubbish import json_values

SECRET: Final = b"a secret of the instance, random"
INSTANCE: Final = 7
NOW: Final = 1_700_000_000.0
MAX_ITEM_BYTES: Final = 200_000
_USUAL_DEPTH: Final = 950
"""The part of the interpreter's limit of 1,000 that a handler has left."""

Check = Callable[[bytes, list[int]], None]

# --------------------------------------------------------------------------- requests


def check_json(data: bytes, _: list[int]) -> None:
    """A request in JSON: its value is one line of an answer, which is read as the same value."""
    try:
        value = content.read_json(data)
    except InvalidRequest:
        return
    line = _line(value)
    if line is not None:
        assert repr(content.read_json(line)) == repr(value)


def check_msgpack(data: bytes, _: list[int]) -> None:
    """A request in MessagePack: its value is packed, and read as the same value. A caller of JSON may get it
    as one line."""
    try:
        value = content.read_msgpack(data)
    except InvalidRequest:
        return
    assert _repr(content.read_msgpack(pack(value))) == _repr(value)
    line = _line(value)
    if line is not None:
        content.read_json(line)


def _line(value: Any) -> bytes | None:
    """Write an item as a line; None for one that JSON cannot carry."""
    try:
        line = content.json_lines([value])
    except (TypeError, ValueError):
        return None
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return line


def check_token(data: bytes, _: list[int]) -> None:
    """A token: no text is accepted but the one that was made; a signed text of any form is no other error."""
    text = data.decode("latin-1")
    with suppress(AuthenticationFailed):
        token.check_token(text, SECRET, INSTANCE, NOW)
        assert text == TOKEN
    with suppress(AuthenticationFailed):
        token.check_token(f"{text}.{token._sign(SECRET, text)}", SECRET, INSTANCE, NOW)


def check_question(data: bytes, _: list[int]) -> None:
    """A question to an instance: an answer, which a caller can read, or InvalidRequest."""
    try:
        answer = _without_waiting(_SERVICE.answer(content.read_json(data), Context()))
    except InvalidRequest:
        return
    assert read_answer(answer) == answer


def _without_waiting(answering: Coroutine[Any, Any, Any]) -> Any:
    try:
        answering.send(None)
    except StopIteration as found:
        return found.value
    raise AssertionError("the answer waits")


# --------------------------------------------------------------------------- answers


def check_answer(data: bytes, sizes: list[int]) -> None:
    """An answer in MessagePack: the items and the end are those of a second reader, however it is split."""
    with _recursion(20_000):
        expected, found = _expected(data), _found(data, sizes)
        assert [_repr(item) for item in found[0]] == [_repr(item) for item in expected[0]]
        assert type(found[1]) is type(expected[1])
        assert _repr(found[1]) == _repr(expected[1]) or isinstance(found[1], ConnectionLost)


def _found(data: bytes, sizes: list[int]) -> tuple[list[Any], PlaneError | None]:
    """Read an answer as the http plane's client does."""
    unpacker = content.new_answer_unpacker(MAX_ITEM_BYTES)
    items: list[Any] = []
    try:
        offset = 0
        for size in [*sizes, len(data)]:
            unpacker.feed(data[offset : offset + size])
            offset += size
            for item in unpacker:
                if item is content.BEAT:
                    continue
                if type(item) is content.End:
                    return items, content.read_end(item.content)
                items.append(item)
    except content.UNPACK_ERRORS as exc:
        return items, ConnectionLost(repr(exc))
    return items, ConnectionLost("cut off")


class _Reader(reference.Reader):
    def extension(self, length: int) -> Any:
        head = self._data[self.offset : self.offset + 1]
        if head not in (_END, _BEAT):
            return super().extension(length)
        self._take(1)
        taken = self._take(length)
        return content.End(taken) if head == _END else content.BEAT


_END: Final = content.END_TYPE.to_bytes(1, "big", signed=True)
_BEAT: Final = content.BEAT_TYPE.to_bytes(1, "big", signed=True)


def _expected(data: bytes) -> tuple[list[Any], PlaneError | None]:
    reader = _Reader(data, 0)
    items: list[Any] = []
    try:
        while True:
            item = reader.value(0)
            if isinstance(item, content.End):
                return items, _expected_end(item.content)
            if item is not content.BEAT:
                items.append(item)
    except (reference.Broken, reference.Partial):
        return items, ConnectionLost("")


def _expected_end(ending: bytes) -> PlaneError | None:
    if not ending:
        return None
    reader = reference.Reader(ending, 0)
    match reader.value(0):
        case [str(code), str(message), details] if reader.offset == len(ending):
            return content.read_error(code, message, details)
    raise reference.Broken


def check_end(data: bytes, _: list[int]) -> None:
    """The end of an answer: an error, which is written and read as the same one, or ValueError."""
    try:
        error = content.read_end(data)
    except ValueError:
        return
    if error is not None and len(str(error)) < 4000:
        _check_same(error, content.read_end(content.msgpack_end(error)[6:]))


def check_problem(data: bytes, _: list[int]) -> None:
    """The body of a refusal: an error, which is written and read as the same one."""
    error = content.read_problem(400 + len(data) % 200, data)
    again = json.dumps(content.problem(error)).encode()
    _check_same(error, content.read_problem(content.status_of(error), again))


def _check_same(error: PlaneError, again: PlaneError | None) -> None:
    assert isinstance(error, PlaneError)
    assert isinstance(again, PlaneError)
    if type(error) is not PlaneError:  # a code that is not known stands in the message
        assert (type(again), str(again)) == (type(error), str(error))
    if isinstance(error, Overloaded) and isinstance(again, Overloaded):
        wanted_s = error.retry_after_s
        assert wanted_s is None or 0 <= wanted_s <= 3600
        assert wanted_s in (None, 3600.0) or again.retry_after_s == wanted_s


def check_service(data: bytes, _: list[int]) -> None:
    """An instance's answer to a question: of the known form, or InvalidRequest."""
    try:
        found = read_answer(content.read_msgpack(data))
    except InvalidRequest:
        return
    json.dumps(found)
    assert all(isinstance(endpoint["name"], str) for endpoint in found.get("endpoints", []))


def check_tunnel(data: bytes, _: list[int]) -> None:
    """A message of a tunnel: is written as the same bytes, or ProtocolViolation."""
    try:
        message = tunnel.decode(data)
    except ProtocolViolation:
        return
    head = tunnel.encode_head(message.kind, message.connection_id, message.number)
    assert head + bytes(message.content) == data


# --------------------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Reading:
    """A check, and messages that its reader is made for."""

    check: Check
    seeds: tuple[bytes | Long, ...]


def _packed(value: Any) -> bytes:
    try:
        return pack(value)
    except TypeError:  # an integer of more than 64 bits
        return b"\xc0"


_ERRORS: Final = (Overloaded("full", retry_after_s=0.25), InvalidRequest("é"), PlaneError("of a new code"))
_REQUESTS: Final[tuple[Any, ...]] = (
    {"prompt": "Hello", "max_tokens": 5, "stop": ["\n", None], "temperature": 0.5, "stream": True},
    [1, -1, 2**63, 1.5, None, True, "é", {"a": {"b": []}}],
    {"question": "stats", "endpoint": "a.b.c"},
)
_STATS: Final = {
    "type": "io.nats.micro.v1.stats_response",
    "id": "7",
    "version": "1.0",
    "endpoints": [{"name": "a.b.c", "num_requests": 5, "p50_processing_time": 7, "data": {"x": [1]}}],
}
TOKEN: Final = token.make_token(SECRET, INSTANCE, NOW + 60)
_SERVICE: Final = Service(TcpServer(PlaneSettings(), secret=None, instance_id=INSTANCE), INSTANCE)
_ID: Final = bytes(range(16))

READINGS: Final[dict[str, Reading]] = {
    "json": Reading(
        check_json, (*(json.dumps(one).encode() for one in _REQUESTS), Long(b"", b"[", 990, b"]" * 990))
    ),
    "msgpack": Reading(
        check_msgpack,
        (*map(pack, (*_REQUESTS, b"\0\xff", msgpack.ExtType(5, b"x"))), Long(b"", b"\x91", 1010, b"\xc0")),
    ),
    "token": Reading(
        check_token,
        (
            TOKEN.encode(),
            token.make_token(b"other", INSTANCE, NOW + 60).encode(),
            token.make_token(SECRET, INSTANCE, NOW - 60).encode(),
            b"v1.7.1700000060",
            b"v1.",
            b".",
        ),
    ),
    "question": Reading(check_question, tuple(json.dumps(one).encode() for one in (_REQUESTS[2], _STATS))),
    "answer": Reading(
        check_answer,
        (
            *WELL_FORMED[:5],
            content.MSGPACK_BEAT,
            content.msgpack_end(),
            *map(content.msgpack_end, _ERRORS),
        ),
    ),
    "end": Reading(check_end, tuple(content.msgpack_end(error)[6:] for error in _ERRORS)),
    "problem": Reading(check_problem, tuple(json.dumps(content.problem(e)).encode() for e in _ERRORS)),
    "service": Reading(check_service, (pack(_STATS),)),
    "tunnel": Reading(
        check_tunnel,
        tuple(tunnel.encode_head(kind, _ID, number) for kind in tunnel.Kind for number in (0, 1, 2**64 - 1)),
    ),
}
"""By name, in the order of `guided`'s first byte."""


def check(name: str, data: bytes, sizes: list[int]) -> None:
    """Check one input of a reader, with the interpreter's usual limit of recursion. Raises AssertionError, or
    any error that escapes from the reader."""
    with _recursion(_USUAL_DEPTH):
        READINGS[name].check(data, sizes)


_nested = st.builds(
    lambda depth, unit, tail: Long(b"", unit, depth, tail),
    st.integers(1, 30) | st.integers(980, 1030) | st.just(100_000),
    st.sampled_from((b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"\x92\xc0", b"\xdd\x00\xff\xff\xff")),
    st.sampled_from((b"", b"\xc0", b"1" + b"]" * 1030, b"\x90")),
)
_pieces = st.one_of(
    json_values().map(lambda value: json.dumps(value).encode()),
    json_values().map(_packed),
    scalars.map(pack),
    st.binary(max_size=40),
    _nested,
)


@st.composite
def _readings(draw: st.DrawFn) -> tuple[str, list[bytes | Long]]:
    name = draw(st.sampled_from(sorted(READINGS)))
    return name, draw(st.lists(st.sampled_from(READINGS[name].seeds) | _pieces, min_size=1, max_size=4))


def contents_property() -> Property:
    """Make the property: each reader passes its check, given its own messages with damage and nonsense."""

    @given(_readings(), edits, splits)
    def property_of_contents(
        drawn: tuple[str, list[bytes | Long]], damage: list[Edit], sizes: list[int]
    ) -> None:
        name, parts = drawn
        event(name)
        check(name, assemble(parts, damage), sizes)

    return property_of_contents


def _repr(value: Any) -> str:
    with _recursion(20_000):
        return repr(_plain(value))


def _plain(value: Any) -> Any:
    """Replace what has no repr of its own."""
    if isinstance(value, content.End):
        return "end", value.content
    if value is content.BEAT:
        return "beat"
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return [(_plain(key), _plain(one)) for key, one in value.items()]
    return value


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Allow this depth from here on: Hypothesis has raised the limit."""
    limit, here = sys.getrecursionlimit(), 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        here, frame = here + 1, frame.f_back
    sys.setrecursionlimit(here + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
