"""Authentication by the handshake, replayed messages, and bytes that are no handshake."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.errors import AuthenticationFailed, PlaneError, ProtocolViolation
from dynamo_redis.wire.codec import pack
from dynamo_redis.wire.handshake import (
    MAX_MESSAGE_BYTES,
    NONCE_BYTES,
    ClientHandshake,
    Hello,
    MessageReader,
    ServerHandshake,
    answer_to,
    is_life_answer,
    life_question,
    new_hello,
    proof,
    refusal,
)

SECRET = b"s" * 32
VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "handshake.json").read_text())


def client(secret: bytes | None = SECRET, instance_id: int = 7) -> ClientHandshake:
    return ClientHandshake(secret, 100, instance_id)


def server(secret: bytes | None = SECRET, instance_id: int = 7) -> ServerHandshake:
    return ServerHandshake(secret, 50, instance_id)


def view(data: bytes) -> memoryview:
    return memoryview(data)


def shake(a: ClientHandshake, b: ServerHandshake) -> None:
    answer, rest = b.feed(view(a.first_message()))
    assert not rest
    last, rest = a.feed(view(answer))
    assert not rest
    b.feed(view(last))


@pytest.mark.parametrize("secret", [SECRET, None])
def test_two_that_know_the_secret_meet(secret: bytes | None) -> None:
    a, b = client(secret), server(secret)
    shake(a, b)
    assert b.done
    assert a.server is not None
    assert a.server.window_count == 50
    assert b.client is not None
    assert b.client.window_count == 100


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(b"x" * 32, SECRET), (None, SECRET), (SECRET, None), (b"", SECRET), (SECRET[:-1], SECRET)],
)
def test_client_notices_a_wrong_server(theirs: bytes | None, ours: bytes | None) -> None:
    a, b = client(ours), server(theirs)
    answer, _ = b.feed(view(a.first_message()))
    with pytest.raises(AuthenticationFailed):
        a.feed(view(answer))


def test_server_notices_a_wrong_client() -> None:
    a, b = client(), server()
    b.feed(view(a.first_message()))
    for wrong in (b"", bytes(32), b"x", "text", None, 1):
        made = server()
        made.feed(view(a.first_message()))
        with pytest.raises(AuthenticationFailed):
            made.feed(view(_message([wrong])))
        assert not made.done


def test_recording_proves_nothing_to_another_connection() -> None:
    a, b = client(), server()
    hello = a.first_message()
    answer, _ = b.feed(view(hello))
    last, _ = a.feed(view(answer))
    b.feed(view(last))
    assert b.done
    replayed = server()
    replayed.feed(view(hello))
    with pytest.raises(AuthenticationFailed):
        replayed.feed(view(last))
    with pytest.raises(AuthenticationFailed):
        client().feed(view(answer))


def test_proof_sent_back_proves_nothing() -> None:
    a, b = client(), server()
    answer, _ = b.feed(view(a.first_message()))
    fields, _ = MessageReader().feed(view(answer))
    assert fields is not None
    with pytest.raises(AuthenticationFailed):
        b.feed(view(_message([fields[-1]])))


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"features": 1}, {"window_count": 9}, {"instance_id": 8}, {"nonce": bytes(32)}],
)
@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("whose", [0, 1])
def test_proof_covers_the_fields_of_both_sides(change: dict[str, Any], role: Any, whose: int) -> None:
    said = [new_hello(5, 7), new_hello(6, 7)]
    before = proof(role, SECRET, said[0], said[1])
    said[whose] = replace(said[whose], **change)
    changed = proof(role, SECRET, said[0], said[1]) != before
    assert changed == (not (whose == 0 and "instance_id" in change))  # compared outright, on the server


def changes(message: bytes) -> Iterator[bytes]:
    """Yield the message with each single byte changed to each other value."""
    for index, byte in enumerate(message):
        for value in range(256):
            if value != byte:
                yield message[:index] + bytes((value,)) + message[index + 1 :]


def test_no_changed_byte_of_the_clients_hello_is_accepted() -> None:
    caller, waiting_count = client(), 0
    for changed in changes(caller.first_message()):
        answer = b""
        with suppress(PlaneError):
            answer, _ = server().feed(view(changed))
            waiting_count += not answer
        if answer:  # the server accepts another HELLO than the client's: its proof is about that one
            with pytest.raises((AuthenticationFailed, ProtocolViolation)):
                again(caller).feed(view(answer))
    assert 0 < waiting_count < MAX_MESSAGE_BYTES, "a length that lies in wait for more, until the time-out"


def test_no_changed_byte_of_the_servers_hello_is_accepted() -> None:
    caller = client()
    answer, _ = server().feed(view(caller.first_message()))
    for changed in changes(answer):
        made = again(caller)
        with suppress(PlaneError):
            assert made.feed(view(changed))[0] == b""
        assert made.server is None


def test_no_changed_byte_of_the_proof_is_accepted() -> None:
    caller, called = client(), server()
    answer, _ = called.feed(view(caller.first_message()))
    last, _ = caller.feed(view(answer))
    for changed in changes(last):
        made = ServerHandshake(SECRET, 50, 7)
        made.server, made.client = called.server, called.client
        with suppress(PlaneError):
            made.feed(view(changed + b"frames"))
        assert not made.done


def again(caller: ClientHandshake) -> ClientHandshake:
    """Return a client that has sent the same HELLO, and received nothing yet."""
    made = client()
    made.client = caller.client
    return made


def test_proof_sent_back_to_the_client_proves_nothing() -> None:
    """A server without the secret reflects the client's own proof, and replays another server's."""
    a = client()
    hello, _ = MessageReader().feed(view(a.first_message()))
    answer, _ = server().feed(view(client().first_message()))
    fields, _ = MessageReader().feed(view(answer))
    assert hello is not None
    assert fields is not None
    mine = proof("client", SECRET, a.client, a.client)
    for stolen in (fields[-1], mine, b""):
        with pytest.raises(AuthenticationFailed):
            again(a).feed(view(_message([*hello, stolen])))


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES + 1, 0xFFFF, 0])
@pytest.mark.parametrize("side", [client, server])
def test_length_over_the_limit_is_refused_before_its_bytes(side: Any, size: int) -> None:
    first, second = size.to_bytes(2, "big")
    for pieces in (
        (bytes((first, second)),),
        (bytes((first,)), bytes((second,))),
        (bytes((first, second, 0)),),
    ):
        made = side()
        for piece in pieces[:-1]:
            made.feed(view(piece))
        with pytest.raises(ProtocolViolation):
            made.feed(view(pieces[-1]))


def test_reader_keeps_one_message_at_most() -> None:
    reader = MessageReader()
    whole = _message([bytes(MAX_MESSAGE_BYTES - 10)])
    for byte in whole[:-1]:
        assert reader.feed(view(bytes((byte,))))[0] is None
    assert len(reader._data) == len(whole) - 1
    fields, rest = reader.feed(view(whole[-1:] + bytes(100_000)))
    assert fields == [bytes(MAX_MESSAGE_BYTES - 10)]
    assert len(rest) == 100_000
    assert not reader._data


def feed_in_two(side: ClientHandshake | ServerHandshake, data: bytes, cut: int) -> tuple[bytes, bytes]:
    """Return all that the side sends, and the rest of the second part."""
    first, rest = side.feed(view(data[:cut]))
    assert not rest
    second, rest = side.feed(view(data[cut:]))
    return first + second, bytes(rest)


def test_handshake_split_at_every_byte() -> None:
    hello = client().first_message()
    answer, _ = server().feed(view(hello))
    for cut in range(1, len(hello)):
        a, b = client(), server()
        answer, _ = feed_in_two(b, a.first_message(), cut)
        last, _ = a.feed(view(answer))
        b.feed(view(last))
        assert b.done
    for cut in range(1, len(answer)):
        a, b = client(), server()
        answer, _ = b.feed(view(a.first_message()))
        last, _ = feed_in_two(a, answer, cut)
        assert a.server is not None
        assert feed_in_two(b, last + b"frames", min(cut, len(last) - 1)) == (b"", b"frames")
        assert b.done


def test_another_instance() -> None:
    with pytest.raises(AuthenticationFailed, match="another instance"):
        server(instance_id=8).feed(view(client().first_message()))


def test_refusal_reaches_the_client_as_the_error_it_is() -> None:
    with pytest.raises(AuthenticationFailed, match="go away"):
        client().feed(view(refusal(AuthenticationFailed("go away"))))


@pytest.mark.parametrize(
    "fields",
    [
        ["DYNR", 0, ["overloaded"], "x"],
        ["DYNR", 0, "overloaded", None],
        ["DYNR", 0, 5, b"x"],
        ["DYNR", 0, [[[]]] * 300, {}],
    ],
)
def test_malformed_refusal(fields: Any) -> None:
    with pytest.raises(ProtocolViolation, match="malformed refusal"):
        client().feed(view(_message(fields)))


def test_deeply_nested_refusal_and_a_key_that_is_an_array() -> None:
    deep = b"\x91" * 900 + b"\xc0"
    for body in (b"\x94\xa4DYNR\x00" + deep + b"\xa0", b"\x81\x90\xc0", deep):
        with pytest.raises(ProtocolViolation):
            client().feed(view(len(body).to_bytes(2, "big") + body))


def test_refusal_cannot_write_lines_of_its_own_into_a_log() -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        client().feed(view(refusal(AuthenticationFailed("no\n2026 ERROR all is lost \x1b[31m"))))
    assert str(caught.value) == "no?2026 ERROR all is lost ?[31m"


def test_newer_client_is_answered_with_the_version_both_speak() -> None:
    newer = _message(["DYNR", 9, 0xFF, 10, 7, bytes(32)])
    made = server(None)
    answer, _ = made.feed(view(newer))
    fields, _ = MessageReader().feed(view(answer))
    assert fields is not None
    assert fields[1] == 1


def test_server_of_another_version_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="version 2"):
        client(None).feed(view(_message(["DYNR", 2, 0, 10, 7, bytes(32), b""])))


GOOD = ["DYNR", 1, 0, 10, 7, bytes(32)]


@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["DYNR"],
        ["HTTP", *GOOD[1:]],
        ["DYNR", 0, *GOOD[2:]],
        ["DYNR", -1, *GOOD[2:]],
        ["DYNR", "1", *GOOD[2:]],
        ["DYNR", True, *GOOD[2:]],
        ["DYNR", 1, 0, 0, 7, bytes(32)],
        ["DYNR", 1, 0, 2**31, 7, bytes(32)],
        ["DYNR", 1, 0, 10, 7, bytes(31)],
        ["DYNR", 1, 0, 10, 7, "x" * 32],
        [*GOOD, 1],
        {"a": 1},
        5,
    ],
)
def test_malformed_hello(fields: Any) -> None:
    with pytest.raises(PlaneError):
        server().feed(view(_message(fields)))


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00rest", b"\xff\xff", b"\x16\x03\x01\x02", b"\x00\x01\xc1"]
)
def test_other_protocols_are_refused_at_their_first_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        server().feed(view(data))


@given(st.integers(0, 2**32))
def test_any_splitting_gives_the_same_handshake(seed: int) -> None:
    rng = random.Random(seed)
    a, b = client(), server()
    to_client, to_server = b"", a.first_message()
    while a.server is None or not b.done:
        step = rng.randint(1, 40)
        answer, rest = b.feed(view(to_server[:step]))
        to_client, to_server = to_client + answer, bytes(rest) + to_server[step:]
        step = rng.randint(1, 40)
        if a.server is None:
            answer, rest = a.feed(view(to_client[:step]))
            to_server, to_client = to_server + answer, bytes(rest) + to_client[step:]


def test_frames_right_behind_the_proof_are_left_for_the_decoder() -> None:
    a, b = client(), server()
    answer, _ = b.feed(view(a.first_message()))
    last, _ = a.feed(view(answer))
    _, rest = b.feed(view(last + b"frames"))
    assert b.done
    assert bytes(rest) == b"frames"


@given(st.binary(max_size=200))
def test_random_bytes_raise_plane_errors_only(data: bytes) -> None:
    for side in (client(), server()):
        with suppress(PlaneError):
            side.feed(view(data))


def test_golden_proofs() -> None:
    secret = bytes.fromhex(VECTORS["secret"])
    a, b = (
        Hello(**{**VECTORS[side], "nonce": bytes.fromhex(VECTORS[side]["nonce"])})
        for side in ("client", "server")
    )
    assert proof("client", secret, a, b).hex() == VECTORS["client_proof"]
    assert proof("server", secret, a, b).hex() == VECTORS["server_proof"]


def _message(fields: Any) -> bytes:
    body = pack(fields)
    return len(body).to_bytes(2, "big") + body


@pytest.mark.parametrize("secret", [SECRET, None])
def test_sign_of_life_is_the_instances_own(secret: bytes | None) -> None:
    nonce = bytes(range(NONCE_BYTES))
    question = life_question(7, nonce)
    answer = answer_to(question, secret, 7)
    assert answer is not None
    assert is_life_answer(answer, secret, 7, nonce)
    assert not is_life_answer(answer, b"another" * 5, 7, nonce)
    assert not is_life_answer(question, secret, 7, nonce)
    assert answer_to(question, secret, 8) is None
    assert answer_to(client().first_message(), secret, 7) is None
    for length in range(len(question)):
        assert answer_to(question[:length], secret, 7) is None


def test_handshake_of_a_life_question_sends_nothing() -> None:
    handshake = server()
    answer, rest = handshake.feed(memoryview(life_question(7, bytes(NONCE_BYTES))))
    assert (answer, bytes(rest), handshake.asks_for_life, handshake.done) == (b"", b"", True, False)
