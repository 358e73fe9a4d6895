"""A few seconds of what `make fuzz` does, and all that it has ever found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz.decoding import check, decoder_property
from tests.fuzz.rounds import one_round
from tests.fuzz.session import Arena, properties
from tests.fuzz.storm import ENDS, KINDS, Storm
from tests.fuzz.streams import Long

SEED = 1


async def test_randomly_cancelled_requests_of_all_kinds_leave_nothing_behind() -> None:
    storm = Storm(SEED)
    await storm.run(4_000)
    assert {end for end, _ in storm.outcomes} == {end.__name__ for end in ENDS}
    assert {"DeadlineExceeded", "RequestCancelled", "HandlerFailed", "ended"} <= {
        outcome for _, outcome in storm.outcomes
    }
    assert len(KINDS) == 10


def test_the_decoder_says_what_the_reference_says() -> None:
    one_round(decoder_property, SEED, 150)


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
    # An extension whose length has no room for its type.
    (b"\x94\xc9\xff\xff\xff\xff" + b"\xff" * 90, [49, 212]),
]


@pytest.mark.parametrize(("data", "sizes"), BYTES_FOUND)
def test_what_was_found_in_the_decoder(data: bytes | Long, sizes: list[int]) -> None:
    check(bytes(data), sizes)


SCRIPTS_FOUND: list[tuple[str, list[Any]]] = []
