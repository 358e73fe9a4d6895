"""The handshake: the exchange that opens each connection and authenticates both sides.

    client → server   HELLO   ["DYNR", version, features, window, instance_id, nonce]
    server → client   HELLO   ["DYNR", version, features, window, instance_id, nonce, proof]
                   or REFUSAL ["DYNR", 0, code, message], and the connection is closed
    client → server   PROOF   [proof], and frames right behind it

Each message is a msgpack array behind its length as two big-endian bytes. Messages are small; a longer one is
refused before it is read. Both sides prove that they know the instance's secret: HMAC-SHA256 over role, both
nonces, and the fields of both HELLOs. The nonces are random for each connection, so a recorded handshake
proves nothing later. The role is in the proof, so a proof cannot be sent back to its maker. With
authentication off the proofs are empty. This is no defence against a relay in the middle of an unencrypted
connection.

Instead of a HELLO a client may ask for a sign of life, on a connection of its own. A worker whose event loop
is busy answers, by a thread; a worker that takes requests closes the connection. Both messages are in the
clear even where the worker speaks TLS:

    client → server   ["DYNL", instance_id, nonce]
    server → client   ["DYNL", proof], and the connection is closed

`version` is the protocol's: the client names the highest that it speaks, the server answers with the one that
both will use. `features` is a bit set; both sides use the features that both have. None is defined yet.
`window` is the number of items of a stream that the peer may send before the sender of this HELLO has read
them.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from dataclasses import dataclass
from typing import Any, Final, Literal

from dynamo_redis.errors import AuthenticationFailed, PlaneError, ProtocolViolation, plane_error
from dynamo_redis.wire.codec import pack, unpack

MAGIC: Final = "DYNR"
LIFE_MAGIC: Final = "DYNL"
VERSION: Final = 1
FEATURES: Final = 0
NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
MAX_MESSAGE_BYTES: Final = 1024
MAX_WINDOW_COUNT: Final = 2**31 - 1

_LENGTH: Final = struct.Struct(">H")
_TRANSCRIPT: Final = struct.Struct(">32s32sHQIHQIQ")
_LIFE: Final = struct.Struct(">32sQ")
_LIFE_LABEL: Final = b"dynamo-redis tcp life\0"
_LIFE_HEAD: Final = b"\x93\xa4DYNL"
_LABEL: Final = {"client": b"dynamo-redis tcp client\0", "server": b"dynamo-redis tcp server\0"}


@dataclass(frozen=True, slots=True)
class Hello:
    """The fields of one side's HELLO. `instance_id` is the server's on both sides."""

    version: int
    features: int
    window_count: int
    instance_id: int
    nonce: bytes


def new_hello(window_count: int, instance_id: int) -> Hello:
    """Make this release's HELLO, with a fresh nonce."""
    return Hello(VERSION, FEATURES, window_count, instance_id, secrets.token_bytes(NONCE_BYTES))


def proof(role: Literal["client", "server"], secret: bytes | None, client: Hello, server: Hello) -> bytes:
    """Return the proof that `role` sends; empty without a secret."""
    if secret is None:
        return b""
    transcript = _TRANSCRIPT.pack(
        client.nonce,
        server.nonce,
        client.version,
        client.features,
        client.window_count,
        server.version,
        server.features,
        server.window_count,
        server.instance_id,
    )
    return hmac.digest(secret, _LABEL[role] + transcript, "sha256")


def life_question(instance_id: int, nonce: bytes) -> bytes:
    """Return the message that asks an instance for a sign of life."""
    return _message([LIFE_MAGIC, instance_id, nonce])


def life_answer(secret: bytes | None, instance_id: int, nonce: bytes) -> bytes:
    """Return the sign of life: a proof that a process which knows the secret lives."""
    proved = b""
    if secret is not None:
        proved = hmac.digest(secret, _LIFE_LABEL + _LIFE.pack(nonce, instance_id), "sha256")
    return _message([LIFE_MAGIC, proved])


def is_life_question(data: bytes) -> bool:
    """Return whether `data`, the first bytes of a connection, ask for a sign of life."""
    return data[_LENGTH.size : _LENGTH.size + len(_LIFE_HEAD)] == _LIFE_HEAD


def answer_to(data: bytes, secret: bytes | None, instance_id: int) -> bytes | None:
    """Return the sign of life if `data`, the first bytes of a connection, ask this instance for one; else
    None."""
    if not is_life_question(data):
        return None
    try:
        question, _ = MessageReader().feed(memoryview(data))
    except ProtocolViolation:
        return None
    if question is None or len(question) != 3 or question[1] != instance_id:
        return None
    nonce = question[2]
    if type(nonce) is not bytes or len(nonce) != NONCE_BYTES:
        return None
    return life_answer(secret, instance_id, nonce)


def is_life_answer(data: bytes, secret: bytes | None, instance_id: int, nonce: bytes) -> bool:
    """Return whether `data` is the sign of life of the instance that was asked."""
    return hmac.compare_digest(data, life_answer(secret, instance_id, nonce))


class MessageReader:
    """Collects one message behind its length."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: memoryview) -> tuple[list[Any] | None, memoryview]:
        """Return the message once it is whole (else None), and the bytes behind it.

        Raises ProtocolViolation.
        """
        taken = data[: self._wanted_bytes()]
        self._data += taken
        rest = data[len(taken) :]
        if len(self._data) == _LENGTH.size and rest:
            return self.feed(rest)
        if self._wanted_bytes():  # raises for a bad length before the first byte behind it is read
            return None, rest
        body = bytes(self._data[_LENGTH.size :])
        self._data.clear()
        try:
            fields = unpack(body)
        except ValueError as exc:
            raise ProtocolViolation("the peer does not speak this protocol") from exc
        if type(fields) is not list:
            raise ProtocolViolation("the peer does not speak this protocol")
        return fields, rest

    def _wanted_bytes(self) -> int:
        if len(self._data) < _LENGTH.size:
            return _LENGTH.size - len(self._data)
        size_bytes = _LENGTH.unpack_from(self._data)[0]
        if not 0 < size_bytes <= MAX_MESSAGE_BYTES:
            raise ProtocolViolation("the peer does not speak this protocol")
        return int(_LENGTH.size + size_bytes - len(self._data))


class ClientHandshake:
    """The client's side of one handshake. Feed it until `server` is set."""

    def __init__(self, secret: bytes | None, window_count: int, instance_id: int) -> None:
        self._secret = secret
        self._reader = MessageReader()
        self.client = new_hello(window_count, instance_id)
        self.server: Hello | None = None

    def first_message(self) -> bytes:
        """Return the client's HELLO."""
        return _message(_hello_fields(self.client))

    def feed(self, data: memoryview) -> tuple[bytes, memoryview]:
        """Return the bytes to send now, and the bytes behind the handshake.

        Raises AuthenticationFailed, ProtocolViolation, or the error that the server refused with.
        """
        fields, rest = self._reader.feed(data)
        if fields is None:
            return b"", rest
        if len(fields) == 4 and fields[:2] == [MAGIC, 0]:
            code, message = fields[2:]
            if type(code) is not str or type(message) is not str:
                raise ProtocolViolation("a malformed refusal")
            # The server is not authenticated, and its text may be logged.
            raise plane_error(_printable(code), _printable(message))
        server = _parse_hello(fields[:-1])
        if server.version != VERSION:
            raise ProtocolViolation(
                f"the server wants protocol version {server.version}, this side speaks {VERSION}: "
                "upgrade the older side"
            )
        if server.instance_id != self.client.instance_id:
            raise AuthenticationFailed("another instance answers at this address")
        _check(fields[-1], proof("server", self._secret, self.client, server))
        self.server = server
        return _message([proof("client", self._secret, self.client, server)]), rest


class ServerHandshake:
    """The server's side of one handshake. Feed it until `done`."""

    def __init__(self, secret: bytes | None, window_count: int, instance_id: int) -> None:
        self._secret = secret
        self._reader = MessageReader()
        self.server = new_hello(window_count, instance_id)
        self.client: Hello | None = None
        self.done = False
        self.asks_for_life = False
        """True if the client asks for a sign of life instead: close the connection."""

    def feed(self, data: memoryview) -> tuple[bytes, memoryview]:
        """Return the bytes to send now, and the bytes behind the handshake (only once `done`).

        Raises AuthenticationFailed or ProtocolViolation; answer with `refusal` and close.
        """
        fields, rest = self._reader.feed(data)
        if fields is None:
            return b"", rest
        if self.client is None and fields[:1] == [LIFE_MAGIC]:
            self.asks_for_life = True
            return b"", rest[:0]
        if self.client is None:
            client = _parse_hello(fields)
            if client.version < VERSION:
                raise ProtocolViolation(
                    f"protocol version {client.version} is not spoken here, {VERSION} is: "
                    "upgrade the older side"
                )
            if client.instance_id != self.server.instance_id:
                raise AuthenticationFailed("another instance answers at this address")
            self.client = client
            own_proof = proof("server", self._secret, client, self.server)
            hello = _message([*_hello_fields(self.server), own_proof])
            more, rest = self.feed(rest) if rest else (b"", rest)
            return hello + more, rest
        if len(fields) != 1:
            raise ProtocolViolation("the peer does not speak this protocol")
        _check(fields[0], proof("client", self._secret, self.client, self.server))
        self.done = True
        return b"", rest


def refusal(error: PlaneError) -> bytes:
    """Return the message that a server sends instead of its HELLO before it closes."""
    return _message([MAGIC, 0, error.code, str(error)[:512]])


def _check(theirs: object, expected: bytes) -> None:
    if type(theirs) is not bytes or not hmac.compare_digest(theirs, expected):
        raise AuthenticationFailed("the peer did not prove that it knows the instance's secret")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _message(fields: list[Any]) -> bytes:
    body = pack(fields)
    return _LENGTH.pack(len(body)) + body


def _hello_fields(hello: Hello) -> list[Any]:
    return [MAGIC, hello.version, hello.features, hello.window_count, hello.instance_id, hello.nonce]


def _parse_hello(fields: list[Any]) -> Hello:
    """Check the fields of a HELLO. Raises ProtocolViolation."""
    if len(fields) != 6 or fields[0] != MAGIC:
        raise ProtocolViolation("the peer does not speak this protocol")
    _, version, features, window_count, instance_id, nonce = fields
    limits = (
        (version, 0xFFFF),
        (features, 2**64 - 1),
        (window_count, MAX_WINDOW_COUNT),
        (instance_id, 2**64 - 1),
    )
    if not all(type(value) is int and 0 <= value <= most for value, most in limits):
        raise ProtocolViolation("a malformed handshake")
    if window_count < 1 or type(nonce) is not bytes or len(nonce) != NONCE_BYTES:
        raise ProtocolViolation("a malformed handshake")
    return Hello(version, features, window_count, instance_id, nonce)
