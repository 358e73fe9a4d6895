"""Flow control of the tcp plane: the sending and the receiving half of a stream of items.

The receiver grants credit: its window at first (it is in the handshake), then what its reader has read, half
a window at a time. An item costs one credit, a raw payload one more for each 64 KiB. The sender may go below
zero with one item, then waits. A stream whose reader has stopped costs at most a window of items at the
receiver and one item at the sender, and stops no other stream.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, Self

from dynamo_redis.errors import PayloadTooLarge, PlaneError, ProtocolViolation, RequestCancelled
from dynamo_redis.planes.frames.connection import Connection
from dynamo_redis.wire.budget import PayloadShare
from dynamo_redis.wire.codec import MAX_INLINE_BYTES
from dynamo_redis.wire.frame import (
    encode_credit,
    encode_end,
    encode_item_raw,
    encode_items,
    encode_last,
    encoding_of,
    payload_of,
    raw_cost,
)


class Sender:
    """Sends the items of one stream. The items of one turn of the event loop, or of a few, share a frame.

    Push only while `ready`; otherwise `await wait_ready()` first. The batch is bounded by the credit and by
    64 KiB, whichever comes first.
    """

    __slots__ = (
        "_batch_bytes",
        "_connection",
        "_credit",
        "_stream_id",
        "_wake",
        "batch",
        "has_sent",
        "open",
    )

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self._connection = connection
        self._stream_id = stream_id
        self._credit = connection.peer_window_count
        self._batch_bytes = 0
        self.batch: list[bytes] | None = None
        self._wake: asyncio.Future[None] | None = None
        self.has_sent = False
        self.open = True

    @property
    def ready(self) -> bool:
        """True if an item may be sent now."""
        return self._credit > 0 and not self._connection.paused

    def push(self, item: Any) -> None:
        """Send one item. Raises TypeError (not msgpack) and PayloadTooLarge; nothing is sent then."""
        payload = payload_of(item)
        size = len(payload)
        self.has_sent = True
        if size > MAX_INLINE_BYTES:
            self._send_raw(item, payload, last=False)
            return
        self._credit -= 1
        if self.batch is not None:
            if self._batch_bytes + size <= MAX_INLINE_BYTES:
                self.batch.append(payload)
                self._batch_bytes += size
                return
            self._connection.flush()
        self.batch = [payload]
        self._batch_bytes = size
        self._connection.mark_dirty(self)

    def take_batch(self) -> bytes:
        """Return the frame of the gathered items. Call it only while `batch` is not None."""
        batch, self.batch = self.batch, None
        assert batch is not None
        return encode_items(self._stream_id, batch, last=False)

    def flush_batch(self) -> None:
        """Write the gathered items, before a frame that must follow them."""
        if self.batch is not None:
            self._connection.send(self.take_batch())

    def end(self) -> None:
        """Send the end, with the last item if that has not left yet."""
        self.open = False
        batch, self.batch = self.batch, None
        if batch is not None:
            self._connection.send(encode_items(self._stream_id, batch, last=True))
        else:
            self._connection.send(encode_end(self._stream_id))

    def end_with(self, item: Any) -> None:
        """Send the only item and the end. Raises as `push` does."""
        payload = payload_of(item)
        if len(payload) <= MAX_INLINE_BYTES:
            self._connection.send(encode_last(self._stream_id, payload))
        else:
            self._send_raw(item, payload, last=True)
        self.open = False

    def _send_raw(self, item: Any, payload: bytes, *, last: bool) -> None:
        size_bytes = len(payload)
        check_size(size_bytes, self._connection.max_message_bytes)
        self._credit -= raw_cost(size_bytes)
        self.flush_batch()
        header = encode_item_raw(self._stream_id, size_bytes, encoding_of(payload, item), last=last)
        self._connection.send_raw(header, payload)

    def drop(self) -> None:
        """Send nothing more. Gathered items are dropped."""
        self.open = False
        self.batch = None
        self._credit = 0  # a sender that checks only its credit stops, too
        if self._wake is not None:
            self.wake()

    def grant(self, count: Any) -> None:
        """Add credit that the receiver gave. Raises ProtocolViolation."""
        if type(count) is not int or count < 1:
            raise ProtocolViolation("a malformed CREDIT")
        self._credit += count
        self.wake()

    def wake(self) -> None:
        """Have `wait_ready` check again."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def wait_ready(self) -> None:
        """Wait until an item may be sent, or the stream or its connection is closed."""
        while self.open and not self.ready and not self._connection.closed:
            self._wake = asyncio.get_running_loop().create_future()
            if self._connection.paused:
                self._connection.add_write_waiter(self)
            try:
                await self._wake
            finally:
                self._wake = None
                self._connection.remove_write_waiter(self)


def check_size(size_bytes: int, limit_bytes: int) -> None:
    """Raise PayloadTooLarge for a payload over the limit."""
    if size_bytes > limit_bytes:
        raise PayloadTooLarge(size_bytes=size_bytes, limit_bytes=limit_bytes)


class _Raw:
    """An unread item that came as a raw payload. Its size is reserved in its connection's share until then.

    A mailbox that is dropped unread releases it through the event loop: the garbage collector may run in any
    thread, and in the middle of the share's own arithmetic.
    """

    __slots__ = ("_loop", "_share", "_size_bytes", "cost", "item")

    def __init__(
        self, item: Any, size_bytes: int, share: PayloadShare, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.item = item
        self.cost = raw_cost(size_bytes)
        self._size_bytes = size_bytes
        self._share = share
        self._loop = loop
        share.reserve(size_bytes)

    def release(self) -> None:
        """Release the size. Idempotent."""
        size_bytes, self._size_bytes = self._size_bytes, 0
        self._share.release(size_bytes)

    def __del__(self) -> None:
        if self._size_bytes:
            with suppress(RuntimeError):  # the event loop is closed, and everything with it
                self._loop.call_soon_threadsafe(self._share.release, self._size_bytes)


_NO_ITEMS: Final[deque[Any]] = deque(maxlen=0)
"""The items of a mailbox before the first is queued: most answers go to a waiting reader, without a queue."""

_WAKE_UP: Final = object()
"""Wakes a reader that must check again: there are items, or the stream has ended."""


class Mailbox:
    """The received items of one stream, and its one reader.

    An item that arrives while the reader waits goes to it directly. Other items are queued, at most a window
    of them: more are a violation of the protocol. Items that came before an end or an error are read first. A
    read that is cancelled removes no item: the next read returns it.
    """

    __slots__ = (
        "_connection",
        "_ended",
        "_error",
        "_extra_cost",
        "_items",
        "_limit",
        "_loop",
        "_unreturned_credit",
        "_waiter",
        "_window",
        "stream_id",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, window_count: int) -> None:
        self._loop = loop
        self._window = window_count
        self._limit = window_count
        self._connection: Connection | None = None
        self.stream_id = 0
        self._items = _NO_ITEMS
        self._extra_cost = 0  # credits that raw payloads in `_items` cost beyond one each
        self._waiter: asyncio.Future[Any] | None = None
        self._unreturned_credit = 0
        self._ended = False
        self._error: Exception | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        item = _WAKE_UP
        if not self._items and not self._ended:
            if self._waiter is not None:
                raise RuntimeError("a stream of items has one reader")
            self._waiter = waiter = self._loop.create_future()
            try:
                item = await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and (item := waiter.result()) is not _WAKE_UP:
                    # It was cancelled after it was given this item: the next read returns it.
                    if self._items is _NO_ITEMS:
                        self._items = deque()
                    self._items.appendleft(item)
                raise
            finally:
                self._waiter = None
        if item is _WAKE_UP:
            if not self._items:
                if self._error is None:
                    raise StopAsyncIteration
                raise self._own_error(self._error)
            item = self._items.popleft()
        if type(item) is _Raw:
            item = self._unwrap(item)
        if not self._ended:
            self._unreturned_credit = count = self._unreturned_credit + 1
            if count * 2 >= self._window:
                self._give_credit()
        return item

    def take_ready(self) -> list[Any]:
        """Return the items that have come and were not read, without waiting."""
        items = [self._unwrap(item) if type(item) is _Raw else item for item in self._items]
        if items:
            self._items.clear()
            if not self._ended:
                self._unreturned_credit = count = self._unreturned_credit + len(items)
                if count * 2 >= self._window:
                    self._give_credit()
        return items

    async def next_items(self) -> list[Any]:
        """Wait for the next item; return it and all that have come behind it. Empty at the end."""
        try:
            first = await self.__anext__()
        except StopAsyncIteration:
            return []
        return [first, *self.take_ready()]

    def _unwrap(self, raw: _Raw) -> Any:
        """Return the item that came as a raw payload, and release its size."""
        self._unreturned_credit += raw.cost - 1
        self._extra_cost -= raw.cost - 1
        raw.release()
        return raw.item

    def _own_error(self, error: Exception) -> Exception:
        """Return a copy of the error that the stream ends with.

        The streams of a lost connection share one error. Each raises a copy: the tracebacks of all would
        otherwise pile up on the one, and keep alive the objects in their frames.
        """
        self._error = None
        if not isinstance(error, PlaneError):
            return error
        own = copy.copy(error)
        own.__cause__ = error.__cause__
        return own

    @property
    def is_over(self) -> bool:
        """See `ResponseStream.is_over`."""
        return self._ended and not self._items and self._error is None

    def _give_credit(self) -> None:
        """Send the credit of the read items, or wait while the connection is paused."""
        connection = self._connection
        if connection is not None:
            if connection.paused:  # else CREDITs for a peer that does not read would pile up
                connection.add_write_waiter(self)
                return
            connection.send(encode_credit(self.stream_id, self._unreturned_credit))
        self._unreturned_credit = 0

    def wake(self) -> None:
        """Send the credit that was held back while the connection was paused."""
        if not self._ended:
            self._give_credit()

    def deliver(self, item: Any) -> None:
        """Hand an item to the reader. Raises ProtocolViolation."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(item)
        else:
            self._enqueue((item,))

    def deliver_raw(self, item: Any, size_bytes: int) -> None:
        """Hand an item that came as a raw payload to the reader. Raises ProtocolViolation."""
        assert self._connection is not None
        if len(self._items) + self._extra_cost >= self._limit:
            raise ProtocolViolation("more than the window allows")
        raw = _Raw(item, size_bytes, self._connection.payload_share, self._loop)
        self._extra_cost += raw.cost - 1
        self.deliver(raw)

    def deliver_batch(self, items: Any) -> None:
        """Hand the items of a batch to the reader. Raises ProtocolViolation."""
        if type(items) is not list or not items:
            raise ProtocolViolation("a malformed batch")
        self._enqueue(items)
        self._wake()

    def _enqueue(self, items: Iterable[Any]) -> None:
        if self._items is _NO_ITEMS:
            self._items = deque(items)
        else:
            self._items.extend(items)
        if len(self._items) > self._limit:
            raise ProtocolViolation("more items than the window allows")

    def finish(self, error: Exception | None = None) -> None:
        """End the stream: no more items come. The first end counts."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def discard(self) -> None:
        """Drop the unread items."""
        for item in self._items:
            if type(item) is _Raw:
                item.release()
        self._items = _NO_ITEMS
        self._extra_cost = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(_WAKE_UP)


class RequestMessages(Mailbox):
    """The iterator of a request-stream handler: the request, then the messages that follow it."""

    __slots__ = ()

    def __init__(self, connection: Connection, stream_id: int, request: Any, window_count: int) -> None:
        super().__init__(asyncio.get_running_loop(), window_count)
        self._connection = connection
        self.stream_id = stream_id
        self._limit = window_count + 1
        self._unreturned_credit = -1  # the request itself cost no credit
        self._items = deque((request,))

    def kill(self) -> None:
        """Drop unread messages and end with RequestCancelled: the request has ended."""
        self.discard()
        self.finish(RequestCancelled("the caller is gone"))
