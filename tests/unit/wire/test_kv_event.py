"""KV events on the wire."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.wire.kv_event import (
    DEVICE,
    DISK,
    HOST,
    REMOVED,
    STORED,
    KvEvent,
    cleared,
    read_kv_events,
    removed,
    stored,
)

hashes = st.lists(st.integers(0, (1 << 64) - 1), max_size=4)
events = st.lists(
    st.one_of(
        st.builds(stored, hashes, st.sampled_from([DEVICE, HOST, DISK])),
        st.builds(removed, hashes, st.sampled_from([DEVICE, HOST]), inside=st.booleans()),
        st.just(cleared()),
    ),
    max_size=8,
)


@given(sent=events)
def test_read_events_equal_the_sent_ones_joined(sent: list[KvEvent]) -> None:
    read = read_kv_events([event.to_wire() for event in sent])
    expected: list[KvEvent] = []
    for event in sent:
        if expected and expected[-1][:2] == event[:2]:
            expected[-1] = KvEvent(event.kind, event.tier, expected[-1].hashes + event.hashes)
        else:
            expected.append(event)
    assert read == expected


def test_kinds_and_tiers_of_later_releases_are_left_out() -> None:
    content = array("Q", [1]).tobytes()
    later = [[9, DEVICE, content], [STORED, 7, content], [STORED, DEVICE, content, {"more": 1}]]
    assert read_kv_events(later) == [stored([1])]
    assert read_kv_events([[STORED, DEVICE, content, 1], [STORED, DEVICE, content, 1]]) == [stored([1, 1])]


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        7,
        "abc",
        b"abc",
        {0: 0, 1: 0, b"": 0},
        [],
        [STORED, DEVICE],
        [True, DEVICE, b""],
        [STORED, "device", b""],
        [STORED, DEVICE, None],
        [STORED, DEVICE, "12345678"],
        [STORED, DEVICE, b"1234567"],
        [[STORED], DEVICE, b""],
    ],
)
def test_batch_with_a_malformed_event_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="not a KV event"):
        read_kv_events([[REMOVED, DEVICE, b""], wrong])


def test_halves_of_names_do_not_join() -> None:
    with pytest.raises(ValueError, match="hashes of 4 bytes"):
        read_kv_events([[STORED, DEVICE, b"1234"], [STORED, DEVICE, b"1234"]])
