"""A few seconds of `make fuzz`, and the inputs that it has found before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dynamo_redis.wire.tunnel import WINDOW_BYTES
from tests.fuzz import contents
from tests.fuzz.contents import contents_property
from tests.fuzz.decoding import check, decoder_property
from tests.fuzz.exchanges import Host, exchanges_property
from tests.fuzz.rounds import one_round
from tests.fuzz.session import Arena, properties
from tests.fuzz.storm import ENDS, KINDS, Storm
from tests.fuzz.streams import Long
from tests.fuzz.tunnels import Act, Conversation, Write, tunnels_property

SEED = 1


async def test_randomly_cancelled_requests_leave_nothing_behind() -> None:
    storm = Storm(SEED)
    await storm.run(4_000)
    assert {end for end, _ in storm.outcomes} == {end.__name__ for end in ENDS}
    assert {"DeadlineExceeded", "RequestCancelled", "HandlerFailed", "ended"} <= {
        outcome for _, outcome in storm.outcomes
    }
    assert len(KINDS) == 10


def test_decoder_equals_the_reference() -> None:
    one_round(decoder_property, SEED, 150)


def test_contents_are_read_or_of_documented_errors() -> None:
    one_round(contents_property, SEED, 150)


def test_tunnels_deliver_in_order_or_end() -> None:
    one_round(tunnels_property, SEED, 150)


def test_exchanges_end_with_documented_answers() -> None:
    with Host() as host:
        one_round(lambda: exchanges_property(host), SEED, 80)


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with Arena() as made:
        yield made


@pytest.mark.parametrize("part", ["server", "client", "handshake"])
def test_conversations_end_with_a_reason_or_go_on(arena: Arena, part: str) -> None:
    one_round(lambda: properties(arena)[part], SEED, 120)


# --------------------------------------------------------------------------- what was found

BYTES_FOUND: list[tuple[bytes | Long, list[int]]] = [
    # A frame over the limit was taken when one read brought all of it.
    (Long(b"\x93\x02\x01\xdb\x00\x01\xff\xf9", b"x", 131_065), []),
    (Long(b"\x93\x02\x01\xdb\x00\x01\xff\xf9", b"x", 131_065), [1]),
    # The most elements that an array may have in a frame, and one more.
    (Long(b"\x93\x03\x01\xdd\x00\x01\x00\x00", b"\x05", 65_536), []),
    (Long(b"\x93\x03\x01\xdd\x00\x01\x00\x01", b"\x05", 65_537), []),
    # An extension whose length has no room for its type.
    (b"\x94\xc9\xff\xff\xff\xff" + b"\xff" * 90, [49, 212]),
    # A raw payload with an array as a map's key ended the connection instead of its stream.
    (b"\x94\x0f\x01\x03\x00" + b"\x81\x90\xc0", []),
]


@pytest.mark.parametrize(("data", "sizes"), BYTES_FOUND)
def test_findings_in_the_decoder(data: bytes | Long, sizes: list[int]) -> None:
    check(bytes(data), sizes)


HANDSHAKES_FOUND: list[bytes] = [
    # An array as a map's key, and a refusal whose code is an array a thousand deep, raised in the event loop.
    b"\x00\x04\x91\x81\x90\xc0",
    bytes(Long(b"\x03\xf3\x94\xa4DYNR\x00", b"\x91", 1000, b"\xc0\xa2no")),
]


@pytest.mark.parametrize("by_client", [True, False])
@pytest.mark.parametrize("data", HANDSHAKES_FOUND)
def test_findings_in_the_handshake(arena: Arena, data: bytes, by_client: bool) -> None:
    assert int.from_bytes(data[:2], "big") == len(data) - 2
    arena.run(
        arena.at_the_door([data], "close") if by_client else arena.with_client([data], "close", shakes=False)
    )


CONTENTS_FOUND: list[tuple[str, bytes | Long]] = [
    # A signed text that is no token, and a question that is an array, raised other errors.
    ("token", b"v1.7.1700000060.5"),
    ("question", b'{"question": []}'),
    # An item that nests deeper than JSON is written.
    ("msgpack", Long(b"", b"\x91", 1010, b"\xc0")),
]


@pytest.mark.parametrize(("name", "data"), CONTENTS_FOUND)
def test_findings_in_contents(name: str, data: bytes | Long) -> None:
    contents.check(name, bytes(data), [])


async def test_finding_in_a_tunnel() -> None:
    """Bytes that waited when their reader ended the connection kept the writer's end of it."""
    await Conversation().hold([Write("caller", WINDOW_BYTES + 1), Act("server", "close")])
