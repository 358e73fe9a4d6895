"""A context's trace, and detached contexts."""

from __future__ import annotations

import pytest

from dynamo_redis.planes.context import Context

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_trace_is_read_from_the_header() -> None:
    context = Context("r", traceparent=TRACEPARENT)
    assert context.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert context.span_id == "00f067aa0ba902b7"
    assert context.trace_headers() == {"traceparent": TRACEPARENT}


@pytest.mark.parametrize("traceparent", [None, "", "00", "00-short-00f067aa0ba902b7-01", "a-b-c-d"])
def test_without_a_valid_header_there_is_no_trace(traceparent: str | None) -> None:
    assert Context("r", traceparent=traceparent).trace_id is None
    assert Context("r", traceparent=traceparent).trace_headers() is None


def test_detached_context_shares_the_trace_and_nothing_else() -> None:
    context = Context("r", {"tenant": "a"}, traceparent=TRACEPARENT)
    other = context.detached("s")
    context.kill()
    context.metadata["tenant"] = "b"
    assert not other.is_stopped()
    assert (other.id(), other.metadata, other.trace_id) == ("s", {"tenant": "a"}, context.trace_id)
