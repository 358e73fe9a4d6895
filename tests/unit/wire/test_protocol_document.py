"""docs/wire-protocol.md against the code: its examples, its tables, its limits."""

from __future__ import annotations

import hmac
import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis import errors
from dynamo_redis.config import PlaneSettings
from dynamo_redis.errors import AuthenticationFailed, PlaneError
from dynamo_redis.planes.frames import client_connection, connection, response_stream
from dynamo_redis.wire import codec, decoder, frame, handshake
from dynamo_redis.wire.decoder import FrameDecoder, ReadBuffers
from dynamo_redis.wire.handshake import ClientHandshake, MessageReader, ServerHandshake
from dynamo_redis.wire.session import CLIENT_STEPS, SERVER_STEPS, ClientStream, ServerStream

DOCUMENT = (Path(__file__).parents[3] / "docs" / "wire-protocol.md").read_text()
SECRET = bytes(range(32))
INSTANCE = 0x694D98147D54BFDE
CLIENT_NONCE, SERVER_NONCE = b"\xc1" * 32, b"\x5e" * 32


def lines(block: str) -> list[str]:
    return DOCUMENT.split(f"<!-- {block}: ", 1)[1].split("```")[1].strip("\n").splitlines()


def to_bytes(line: str) -> bytes:
    """Return the bytes at the beginning of a line, before its comment."""
    digits = re.match(r"(?:[0-9a-f]{2} {1,2})*[0-9a-f]{2}(?=$|\s)", line)
    assert digits is not None, line
    return bytes.fromhex(digits[0])


def said(arrow: str, block: str) -> bytes:
    return b"".join(to_bytes(line[2:]) for line in lines(block) if line.startswith(arrow))


def decode(data: bytes | memoryview) -> list[list[Any]]:
    made = FrameDecoder(ReadBuffers(), 1000)
    frames = made.feed(memoryview(data))
    assert made.is_between_frames
    assert made.error is None
    return frames


def client(monkeypatch: pytest.MonkeyPatch, secret: bytes | None, instance_id: int) -> ClientHandshake:
    monkeypatch.setattr("secrets.token_bytes", lambda _: CLIENT_NONCE)
    return ClientHandshake(secret, 100, instance_id)


def server(monkeypatch: pytest.MonkeyPatch, secret: bytes | None, instance_id: int) -> ServerHandshake:
    monkeypatch.setattr("secrets.token_bytes", lambda _: SERVER_NONCE)
    return ServerHandshake(secret, 100, instance_id)


# --------------------------------------------------------------------------- examples


def test_server_understands_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    made = server(monkeypatch, None, 0x1A)
    _, rest = made.feed(memoryview(said("→", "example")))
    assert made.done
    assert decode(rest) == [
        [frame.OPEN, 1, "1a/dynamo/backend/generate", 0, None, {"n": 2}],
        [frame.OPEN, 2, "1a/d/b/g", 0, {"id": "r-1"}, None],
        [frame.CANCEL, 2, frame.Strength.STOP],
        [frame.PING, 0, 7],
    ]


def test_client_understands_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    made = client(monkeypatch, None, 0x1A)
    answer, rest = made.feed(memoryview(said("←", "example")))
    assert made.server is not None
    assert MessageReader().feed(memoryview(answer))[0] == [b""]
    assert decode(rest) == [
        [frame.LAST, 1, "hi"],
        [frame.BATCH, 2, ["a", "b"]],
        [frame.LAST, 2, "c"],
        [frame.PONG, 0, 7],
    ]


def test_handshake_with_a_secret_equals_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    caller, worker = client(monkeypatch, SECRET, INSTANCE), server(monkeypatch, SECRET, INSTANCE)
    hello = caller.first_message()
    answer, _ = worker.feed(memoryview(hello))
    proof, _ = caller.feed(memoryview(answer))
    worker.feed(memoryview(proof))
    assert worker.done
    to_server, to_client = said("→", "secret"), said("←", "secret")
    assert to_server.startswith(hello + proof)
    assert to_client.startswith(answer)
    assert decode(to_server[len(hello + proof) :]) == [
        [frame.OPEN, 1, "s/count", 1, None, "a"],
        [frame.DATA, 1, "b"],
        [frame.LAST, 1, "c"],
        [frame.OPEN_RAW, 2, "s/echo", 0, None, 3, [1, 2]],
        [frame.OPEN, 3, "s/echo", 0, None, None],
    ]
    assert decode(to_client[len(answer) :]) == [
        [frame.ACCEPT, 1],
        [frame.CREDIT, 1, 50],
        [frame.LAST, 1, 3],
        [frame.LAST_RAW, 2, 3, [1, 2]],
        [frame.ERROR, 3, "overloaded", "full", {"retry_after_ms": 250}],
        [frame.GOAWAY, 0, "draining", "bye"],
    ]


def test_proof_of_the_server_is_the_hmac_of_the_example() -> None:
    transcript = b"".join(map(to_bytes, lines("transcript")))
    assert len(transcript) == 124
    assert hmac.digest(SECRET, transcript, "sha256") in said("←", "secret")


def test_refusal_equals_the_example() -> None:
    assert said("←", "refusal") == handshake.refusal(AuthenticationFailed("no"))


def test_every_frame_has_a_line() -> None:
    names = {
        name: getattr(frame, name) for name in re.findall(r"^\| \d+ \| ([A-Z_]+) \|", DOCUMENT, re.MULTILINE)
    }
    words = {"nil": "None", "kill": "2", "binary": "1", "msgpack": "0"}
    seen = []
    for line in lines("frames"):
        [decoded] = decode(to_bytes(line))
        shown = line[line.index("[") :]
        for word, value in (names | words).items():
            shown = re.sub(rf"\b{word}\b(?!\")", str(value), shown)
        header, _, payload = shown.partition("] ")
        if payload:  # the size and the encoding stand for the payload behind them
            fields = literal_eval(header + "]")
            raw = literal_eval(payload)
            assert decoded == [*fields[:-1], raw.encode() if fields[-1] == 1 else raw]
        else:
            assert decoded == literal_eval(shown)
        seen.append(decoded[0])
    assert seen == list(range(1, 17))


# --------------------------------------------------------------------------- tables


def test_table_lists_every_frame() -> None:
    listed = dict(re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", DOCUMENT, re.MULTILINE))
    assert {name: int(kind) for kind, name in listed.items()} == {
        name: getattr(frame, name) for name in listed.values()
    }
    assert set(listed) == {str(kind) for kind in range(1, 17)}


def test_limits_are_the_codes() -> None:
    for said_so in (
        f"| handshake message | {handshake.MAX_MESSAGE_BYTES} bytes |",
        f"behind it | {codec.MAX_FRAME_BYTES // 1024} KiB |",
        f"| payload inside a frame | {codec.MAX_INLINE_BYTES // 1024} KiB |",
        f"packed | {codec.MAX_HEADERS_BYTES // 1024} KiB |",
        f"pairs of a map | {codec.MAX_INLINE_BYTES:,} |",
        f"| {codec.MAX_DEPTH} arrays and maps deep |",
        f"`1 + size div {frame.CREDIT_UNIT_BYTES}`",
        f"or {decoder.STEP_BYTES // 1024} KiB further",
        f"| integer, 0 to 2{superscript(frame.MAX_DEADLINE_MS.bit_length() - 1)}: ",
        f"| stream id | 2{superscript(frame.MAX_STREAM_ID.bit_length())}−1 |",
        f"more than {response_stream.LONGEST_RETRY_S:g} s is",
    ):
        assert said_so in DOCUMENT, said_so


def test_times_are_the_settings() -> None:
    settings = PlaneSettings.load()
    defaults = dict(re.findall(r"\| (?:twice )?`(DYN_\w+)` \| (\d+) s \|", DOCUMENT))
    assert defaults == {
        "DYN_TCP_CONNECT_TIMEOUT": f"{settings.connect_timeout_s:g}",
        "DYN_TCP_REQUEST_TIMEOUT": f"{settings.accept_timeout_s:g}",
        "DYN_TCP_KEEPALIVE_S": f"{2 * settings.keepalive_interval_s:g}",  # the last row is of twice that
    }
    assert f"| {client_connection.IDLE_CLOSE_S:g} s | client |" in DOCUMENT
    assert f"| {connection._LINGER_S:g} s | both |" in DOCUMENT


def test_errors_are_those_of_the_tree() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| [A-Z, ]+ \| (yes|no|once)", DOCUMENT, re.MULTILINE))
    classes = {
        cls.code: cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, PlaneError) and cls is not PlaneError
    }
    others = set(
        re.findall(r"`(\w+)`", DOCUMENT.split("of a call of its own: ", 1)[-1].split(". Those", 1)[0])
    )
    assert set(rows) | (others & set(classes)) == set(classes)
    for code, may_retry in rows.items():
        assert classes[code].retryable == (may_retry != "no"), code


def test_closed_stream_ignores_late_frames() -> None:
    [shown] = re.findall(r"at the server types ([\d ,to]+); at the client ([\d ,to]+)\)", DOCUMENT)
    at_server = {abs(kind) for kind in SERVER_STEPS[ServerStream.CLOSED]}
    assert numbers(shown[0]) == at_server
    assert numbers(shown[1]) == set(CLIENT_STEPS[ClientStream.CLOSED])


def superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def numbers(text: str) -> set[int]:
    """Parse `2 to 4, 9` to numbers."""
    spans = [part.split(" to ") for part in text.split(", ")]
    return {number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)}
