"""The life of a request on a connection, as tables: state × input → next state.

Rules, on both sides:

- The client numbers its streams 1, 2, 3, …; an id is used once a connection.
- A request is one OPEN, or an OPEN that announces a request stream, items, and an end. An answer is any
  number of items, then an end or an ERROR. The end may ride on the last item (LAST, LAST_BATCH).
- Any frame of the stream from the server means that it accepted the request; ACCEPT means nothing else.
- CANCEL(stop) asks the server to end soon; the stream goes on until it does. CANCEL(kill) ends it at once.
- A closed stream ignores every frame that was legal while it was open: such frames were on their way when it
  closed. CANCEL and CREDIT cross with the end of the stream all the time.
- An input that a table does not list is a violation: the connection is closed, with the reason in GOAWAY.

Each side moves a stream for two reasons: a frame that it receives, by these tables, and an end of its own (a
kill, a deadline, a lost connection), which closes the stream from any state. The adapters in `planes/` look
up each frame that they receive.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from dynamo_redis.wire import frame


class ClientStream(IntEnum):
    """A stream as the client sees it."""

    UNOPENED = 0  # no OPEN was sent with this id
    WAITING = 1  # OPEN was sent, no frame has come back
    ANSWERED = 2  # the server accepted the request; items may come
    CLOSED = 3  # ended, failed or killed


class ServerStream(IntEnum):
    """A stream as the server sees it."""

    UNOPENED = 0  # no OPEN came with this id
    RECEIVING = 1  # a request stream is open: more messages may come
    RUNNING = 2  # the request is complete
    CLOSED = 3  # answered, failed or killed


OPEN_STREAMING: Final = -frame.OPEN
"""As input: an OPEN (or OPEN_RAW, which the tables do not distinguish) that announces a request stream. This
number and `KILL` are no frame types: a frame with such a type is a violation and must not reach the
tables."""

KILL: Final = -frame.CANCEL
"""As input: a CANCEL with strength kill; `frame.CANCEL` stands for a stop."""


_CLIENT_OPEN: Final = {
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

CLIENT_STEPS: Final[tuple[dict[int, ClientStream], ...]] = (
    {},  # UNOPENED
    _CLIENT_OPEN,  # WAITING
    _CLIENT_OPEN,  # ANSWERED
    dict.fromkeys(_CLIENT_OPEN, ClientStream.CLOSED),  # CLOSED
)
"""`CLIENT_STEPS[state][frame type]`: the client's next state; a missing entry is a violation."""

_SERVER_UNOPENED: Final = {frame.OPEN: ServerStream.RUNNING, OPEN_STREAMING: ServerStream.RECEIVING}
_SERVER_RECEIVING: Final = {
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
_SERVER_RUNNING: Final = {
    frame.CREDIT: ServerStream.RUNNING,
    frame.CANCEL: ServerStream.RUNNING,
    KILL: ServerStream.CLOSED,
}

SERVER_STEPS: Final[tuple[dict[int, ServerStream], ...]] = (
    _SERVER_UNOPENED,
    _SERVER_RECEIVING,
    _SERVER_RUNNING,
    dict.fromkeys(_SERVER_RECEIVING, ServerStream.CLOSED),
)
"""`SERVER_STEPS[state][input]`: the server's next state; a missing entry is a violation."""
