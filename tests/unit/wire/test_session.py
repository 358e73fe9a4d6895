"""The state tables, driven with every input in every state."""

from __future__ import annotations

from itertools import product

import pytest

from dynamo_redis.wire import frame
from dynamo_redis.wire.session import (
    CLIENT_STEPS,
    KILL,
    OPEN_STREAMING,
    SERVER_STEPS,
    ClientStream,
    ServerStream,
)

KINDS = tuple(range(1, 17))
UNKNOWN = (0, 17, 63, 64, 100, 127)
INPUTS = (*KINDS, OPEN_STREAMING, KILL, *UNKNOWN)

ITEMS = {frame.DATA, frame.DATA_RAW, frame.BATCH}
ENDS = {frame.END, frame.LAST, frame.LAST_RAW, frame.LAST_BATCH}


def expected_client(state: ClientStream, kind: int) -> ClientStream | None:
    """The rules of `session` in prose, as code that shares nothing with the tables."""
    if state is ClientStream.UNOPENED or kind not in ITEMS | ENDS | {frame.ERROR, frame.ACCEPT, frame.CREDIT}:
        return None
    if state is ClientStream.CLOSED or kind in ENDS or kind == frame.ERROR:
        return ClientStream.CLOSED
    return ClientStream.ANSWERED


def expected_server(state: ServerStream, kind: int) -> ServerStream | None:
    if state is ServerStream.UNOPENED:
        return {frame.OPEN: ServerStream.RUNNING, OPEN_STREAMING: ServerStream.RECEIVING}.get(kind)
    if kind in (frame.CREDIT, frame.CANCEL):
        return state
    if kind == KILL:
        return ServerStream.CLOSED
    if kind not in ITEMS | ENDS or state is ServerStream.RUNNING:
        return None
    if state is ServerStream.CLOSED or kind in ITEMS:
        return state
    return ServerStream.RUNNING


@pytest.mark.parametrize(("state", "kind"), list(product(ClientStream, INPUTS)))
def test_client(state: ClientStream, kind: int) -> None:
    assert CLIENT_STEPS[state].get(kind) == expected_client(state, kind)


@pytest.mark.parametrize(("state", "kind"), list(product(ServerStream, INPUTS)))
def test_server(state: ServerStream, kind: int) -> None:
    assert SERVER_STEPS[state].get(kind) == expected_server(state, kind)


def test_no_way_leads_back() -> None:
    for row, client in zip(CLIENT_STEPS, ClientStream, strict=True):
        assert all(after >= client for after in row.values())
    for steps, server in zip(SERVER_STEPS, ServerStream, strict=True):
        assert all(after >= server for after in steps.values())
