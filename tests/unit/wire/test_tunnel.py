"""Messages of a tunnel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_redis.errors import ProtocolViolation
from dynamo_redis.wire import tunnel
from dynamo_redis.wire.tunnel import HEAD_BYTES, ID_BYTES, Kind


@given(
    st.sampled_from(Kind),
    st.binary(min_size=ID_BYTES, max_size=ID_BYTES),
    st.integers(0, 2**64 - 1),
    st.binary(),
)
def test_messages_are_read_as_written(kind: Kind, connection_id: bytes, number: int, content: bytes) -> None:
    message = tunnel.decode(tunnel.encode_head(kind, connection_id, number) + content)
    assert tuple(message) == (kind, connection_id, number, content)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    if len(data) >= HEAD_BYTES and data[0] in set(Kind):
        assert tunnel.decode(data).content == data[HEAD_BYTES:]
    else:
        with pytest.raises(ProtocolViolation):
            tunnel.decode(data)
