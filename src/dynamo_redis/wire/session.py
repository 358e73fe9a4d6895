"""The life of a request on a connection, as tables: state × input → next state.

Rules, on both sides:

- The client numbers its streams 1, 2, 3, …; an id is used once a connection.
- A request is one OPEN, or an OPEN that announces a request stream, items, and an end. An answer is any
  number of items, then an end or an ERROR. The end may ride on the last item (LAST, LAST_BATCH).
- Any frame of the stream from the server means that it accepted the request; ACCEPT says only that.
- CANCEL(stop) asks the server to end soon; the stream goes on until it does. CANCEL(kill) ends it at once.
- A closed stream takes everything that was legal while it was open, and ignores it: such frames were on
  their way when it closed. CANCEL and CREDIT cross with the end of the stream all the time.
- What the tables do not list is a violation: the connection is closed, with the reason in GOAWAY.

The adapters in `planes/` ask these tables for each frame they receive.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from dynamo_redis.wire import frame


class ClientStream(IntEnum):
    """A stream as the client sees it."""

    UNOPENED = 0  # no OPEN was sent with this id
    WAITING = 1  # OPEN was sent, nothing was heard
    ANSWERED = 2  # the server accepted; items may come
    CLOSED = 3  # ended, failed or killed


class ServerStream(IntEnum):
    """A stream as the server sees it."""

    UNOPENED = 0  # no OPEN came with this id
    RECEIVING = 1  # a request stream is still coming in
    RUNNING = 2  # the request is complete
    CLOSED = 3  # answered, failed or killed


OPEN_STREAMING: Final = -frame.OPEN
"""As input: an OPEN (or OPEN_RAW, which is the same to the tables) that announces a request stream. No frame
has such a type, nor that of `KILL`: one that says so is a violation, and must not get to the tables."""

KILL: Final = -frame.CANCEL
"""As input: a CANCEL with strength kill; `frame.CANCEL` stands for a stop."""


def _client_steps() -> tuple[dict[int, ClientStream], ...]:
    alive = {
        frame.ACCEPT: ClientStream.ANSWERED,
        frame.CREDIT: ClientStream.ANSWERED,
        frame.DATA: ClientStream.ANSWERED,
        frame.DATA_RAW: ClientStream.ANSWERED,
        frame.BATCH: ClientStream.ANSWERED,
        frame.END: ClientStream.CLOSED,
        frame.LAST: ClientStream.CLOSED,
        frame.LAST_RAW: ClientStream.CLOSED,
        frame.LAST_BATCH: ClientStream.CLOSED,
        frame.ERROR: ClientStream.CLOSED,
    }
    return ({}, alive, alive, dict.fromkeys(alive, ClientStream.CLOSED))


def _server_steps() -> tuple[dict[int, ServerStream], ...]:
    unopened = {frame.OPEN: ServerStream.RUNNING, OPEN_STREAMING: ServerStream.RECEIVING}
    receiving = {
        frame.DATA: ServerStream.RECEIVING,
        frame.DATA_RAW: ServerStream.RECEIVING,
        frame.BATCH: ServerStream.RECEIVING,
        frame.END: ServerStream.RUNNING,
        frame.LAST: ServerStream.RUNNING,
        frame.LAST_RAW: ServerStream.RUNNING,
        frame.LAST_BATCH: ServerStream.RUNNING,
        frame.CREDIT: ServerStream.RECEIVING,
        frame.CANCEL: ServerStream.RECEIVING,
        KILL: ServerStream.CLOSED,
    }
    running = {
        frame.CREDIT: ServerStream.RUNNING,
        frame.CANCEL: ServerStream.RUNNING,
        KILL: ServerStream.CLOSED,
    }
    return (unopened, receiving, running, dict.fromkeys(receiving, ServerStream.CLOSED))


CLIENT_STEPS: Final = _client_steps()
"""`CLIENT_STEPS[state][frame type]`: the client's next state; a missing entry is a violation."""

SERVER_STEPS: Final = _server_steps()
"""`SERVER_STEPS[state][input]`: the server's next state; a missing entry is a violation."""
