"""One connection of the tcp plane: the part that client and server share.

**States.** A connection is in one of four. The states of its streams are in `wire/session.py`.

    state      flags               meaning                               ends with
    handshake  neither is set      bytes go to the handshake             the peer's proof: open
                                                                         an error, the time-out: closed
    open       `_ready`            bytes are frames; streams may start   GOAWAY "draining": leaving
                                                                         any end below: closed
    leaving    client: no longer   no new stream starts; present         its last stream: closed
               `usable`            streams continue                      any end below: closed
    closed     `closed`            no frame is handled, none is sent     final

The subclasses move a connection from handshake to open (`on_handshake_bytes`) and from open to leaving (the
client: GOAWAY, used-up stream ids, a stale connection). The time-out of the handshake is a timer at the
server and the dial's time limit at the client.

**Ends.** Whichever comes first runs `_end`, once: it stops the sweep, drops unsent output, and ends the
streams through `on_closed`. Later ends do nothing.

- `connection_lost`, `eof_received`: the peer or the network closed it. ConnectionLost.
- `fail`: a violation of the protocol, or the verdict of a sweep. The peer gets a GOAWAY with the reason.
- `close`: this side needs it no more: idle, drained, shut down, refused.

After `fail` and `close` the transport may still hand over written bytes for `_LINGER_S`, then it is aborted.

**Liveness.** While a stream, an unsent byte or an incomplete frame exists, the connection is swept
`SWEEPS_PER_INTERVAL` times a keepalive interval. Silence is counted in this side's sweeps since the last byte
came, so a pause of this side's own event loop counts as one sweep at most. A silent peer gets a PING at
`PING_AT`; the subclass is told at `QUIET_AT`; then the connection fails with PeerSilent: after `_CUT_OFF_AT`
sweeps if the peer's kernel acknowledges nothing either, else after `_lost_at`. A peer that sends but does not
finish a frame for `_STUCK_AT` sweeps fails with ProtocolViolation. The sweep also does each side's slow
bookkeeping (acceptance time-outs, ACCEPT), so no request needs a timer of its own.

**Writes** of one turn of the event loop leave in one piece: the first schedules the flush. Streamed items may
wait for those of the next turns, 200 µs at most. Reads land in a buffer that the event loop's connections
share (`wire/decoder.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import sys
import time
from abc import abstractmethod
from contextvars import Context, copy_context
from typing import Any, ClassVar, Final, Protocol, cast

from dynamo_redis.errors import ConnectionLost, PeerSilent, PlaneError, ProtocolViolation
from dynamo_redis.planes.frames.paced_writes import PACED_HIGH_WATER_BYTES, PacedWriter
from dynamo_redis.wire import frame
from dynamo_redis.wire.decoder import FrameDecoder, ReadBuffers

EARLY_FLUSH_COUNT: Final = 32
"""Frames gathered in one turn of the event loop after which they are written at once: the peer handles them
while this side makes more. With two free cores this is 1.7 times the throughput of 64 small requests at
once."""

SWEEPS_PER_INTERVAL: Final = 8
WRITE_HIGH_WATER_BYTES: Final = 512 * 1024
"""Unsent bytes past which a connection takes no more items until the peer has read."""

_GATHER_S: Final = 0.0002
_GATHER_TURNS: Final = 8

# Silent sweeps in a row.
QUIET_AT: Final = 6
_CUT_OFF_AT: Final = 2 * SWEEPS_PER_INTERVAL
_STUCK_AT: Final = 2 * SWEEPS_PER_INTERVAL

SILENT_S: Final = 5.0
"""Seconds without an answer to a PING, at least five keepalive intervals, before a peer is given up whose
host still acknowledges sent bytes: its event loop may be busy."""
_SILENT_INTERVALS: Final = 5

_TCP_INFO: Final = getattr(socket, "TCP_INFO", None)
_TCP_INFO_BYTES: Final = 8
_RETRANSMITS_AT: Final = 2  # tcpi_retransmits, u8: time-outs of the data under way since the last ACK
_CUT_OFF_RETRANSMITS: Final = 2

_LINGER_S: Final = 1.0
"""Seconds that a closing connection may take to hand over the written bytes."""

_TCP_KEEPALIVE: Final = (
    ("TCP_KEEPIDLE", 60),
    ("TCP_KEEPINTVL", 15),
    ("TCP_KEEPCNT", 4),
    # While data is unacknowledged the kernel sends no keepalive, but repeats the data for a quarter of an
    # hour. A connection whose last answer went to a host without power would stay that long.
    ("TCP_USER_TIMEOUT", 120_000),  # milliseconds; 60 + 4 × 15 s, as with the others
)

_log = logging.getLogger(__name__)


class Waiter(Protocol):
    """Waits until a connection can be written to."""

    def wake(self) -> None:
        """Continue: the connection can be written to, or has ended."""
        ...


class Outgoing(Waiter, Protocol):
    """Sends the items of one stream (`flow.Sender`)."""

    batch: list[bytes] | None
    """The packed items gathered in this turn of the event loop."""

    def take_batch(self) -> bytes:
        """Return the frame of the gathered items; `batch` is None afterwards."""
        ...


class Connection(asyncio.BufferedProtocol):
    """Bytes in, frames out, and back; keepalive.

    Subclasses implement the hooks `on_…`: the handshake, the frames, the sweep, and the end. Nothing here
    awaits; everything runs in the event loop's callbacks.
    """

    __slots__ = (
        "_abort_handle",
        "_blocked",
        "_dirty",
        "_flush_scheduled",
        "_gathered_at",
        "_gathering_turns",
        "_heard",
        "_life_shown_at",
        "_loop",
        "_lost_at",
        "_out",
        "_out_has_raw",
        "_paced",
        "_ready",
        "_silent_sweeps",
        "_stuck_sweeps",
        "_sweep_handle",
        "_sweep_interval_s",
        "_unfinished",
        "_unsent_bytes",
        "closed",
        "decoder",
        "error",
        "max_message_bytes",
        "paused",
        "payload_share",
        "peer_window_count",
        "streams",
        "sweeping",
        "sweeps",
        "transport",
        "variables",
        "window_count",
        "written_bytes",
    )

    PING_AT: ClassVar[int] = SWEEPS_PER_INTERVAL - 1
    """Silent sweeps after which the peer gets a PING."""

    streams: dict[int, Any]
    """The open streams, by stream id."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffers: ReadBuffers,
        *,
        window_count: int,
        max_message_bytes: int,
        keepalive_interval_s: float,
    ) -> None:
        self._loop = loop
        self._out: list[bytes] = []
        self._out_has_raw = False
        self._dirty: list[Outgoing] = []
        self._flush_scheduled = False
        self._gathered_at = 0.0
        self._gathering_turns = 0
        self._abort_handle: asyncio.TimerHandle | None = None
        self._blocked: set[Waiter] = set()
        self._heard = False
        self._life_shown_at = loop.time()
        self._ready = False
        self._silent_sweeps = 0
        self._stuck_sweeps = 0
        self._unfinished: tuple[int, int] | None = None
        self._sweep_handle: asyncio.TimerHandle | None = None
        self._sweep_interval_s = keepalive_interval_s / SWEEPS_PER_INTERVAL
        self._lost_at = self.PING_AT + max(
            _SILENT_INTERVALS * SWEEPS_PER_INTERVAL, math.ceil(SILENT_S / self._sweep_interval_s)
        )
        self._unsent_bytes = 0
        self._paced: PacedWriter | None = None
        self.written_bytes = 0
        """Count of all bytes written so far; `unsent_bytes` of them have not left yet."""
        self.sweeping = False
        self.sweeps = 0
        self.closed = False
        self.paused = False
        self.error: PlaneError | None = None
        self.window_count = window_count
        self.peer_window_count = 0
        self.max_message_bytes = max_message_bytes
        self.decoder = FrameDecoder(buffers, max_message_bytes)
        self.payload_share = self.decoder.share
        self.transport: asyncio.Transport
        self.variables: Context
        """The context variables of the code that made the connection, not of a request."""

    # ------------------------------------------------------------------- callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        self.variables = copy_context()
        if transport.get_extra_info("sslcontext") is None:
            self.transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        else:
            self.transport.set_write_buffer_limits(high=PACED_HIGH_WATER_BYTES)
            self._paced = PacedWriter(self.transport)
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):  # a unix socket; no such option; no socket
            # asyncio does not set TCP_NODELAY on a socket that was accepted elsewhere. Keepalive is for idle
            # connections: the sweep watches those with streams.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _TCP_KEEPALIVE:
                if (option := getattr(socket, name, None)) is not None:
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.decoder.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed:
            return
        self._heard = True
        if self._ready:
            self._dispatch(self.decoder.received(nbytes))
        else:
            self._feed_handshake(self.decoder.buffer()[:nbytes])

    def eof_received(self) -> bool:
        where = "" if self.decoder.is_between_frames else " in the middle of a frame"
        self.fail(ConnectionLost(f"the peer closed the connection{where}"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc is not None else ""
        if self._abort_handle is not None:
            self._abort_handle.cancel()
        self._end(self.error or ConnectionLost(f"the connection broke{reason}"))

    def pause_writing(self) -> None:
        self.paused = True
        if self._paced is not None:
            self._paced.paused = True

    def resume_writing(self) -> None:
        if self._paced is not None and not self.closed:
            self._paced.resume()
            if self._paced.paused:
                return
        self.paused = False
        blocked, self._blocked = self._blocked, set()
        for waiter in blocked:
            waiter.wake()

    # ------------------------------------------------------------------- reading

    def _feed_handshake(self, data: memoryview) -> None:
        """Handle bytes of the handshake, and frames right behind it."""
        try:
            rest = self.on_handshake_bytes(data)
        except PlaneError as exc:
            self.on_handshake_failed(exc)
            return
        if self._ready and rest:
            self._dispatch(self.decoder.feed(rest))

    def on_payload_progress(self) -> None:
        """Send a PING, at most one a sweep, to a peer that is busy sending a large payload: it is being
        read."""
        now = self._loop.time()
        if now - self._life_shown_at >= self._sweep_interval_s:
            self._life_shown_at = now
            self.send(frame.encode_ping(0))

    def _dispatch(self, frames: list[list[Any]]) -> None:
        """Handle decoded frames, and fail the connection at a violation. Schedule the flush of what they
        cause."""
        try:
            self.on_frames(frames)
        except (IndexError, TypeError, ValueError, RecursionError, MemoryError) as exc:
            _log.debug("malformed frame", exc_info=exc)
            self.fail(ProtocolViolation(f"a malformed frame: {exc}"))
        except ProtocolViolation as exc:
            self.fail(exc)
        else:
            if self.decoder.error is not None:
                self.fail(self.decoder.error)
                return
            if not self.decoder.is_between_frames:  # the sweep fails the connection if the rest does not come
                if self.decoder.in_raw_payload:
                    self.on_payload_progress()
                if not self.sweeping and not self.closed:
                    self.start_sweeping()
            if not self._flush_scheduled:
                # Scheduled behind the tasks that these frames wake: their output leaves in the same turn.
                self._flush_scheduled = True
                self._loop.call_soon(self.flush)

    def _on_connection_frame(self, received: list[Any]) -> bool:
        """Handle a frame that means the same on both sides. Return False for other frames."""
        kind, stream_id = received[0], received[1]
        if kind == frame.PING and stream_id == 0:
            self.on_ping(_token(received))
        elif kind == frame.PONG and stream_id == 0:
            self.on_pong(_token(received))
        elif type(kind) is int and 0 < kind < 0x80 and kind & frame.OPTIONAL:
            pass
        else:
            return False
        return True

    def on_ping(self, token: int) -> None:
        """Answer a PING."""
        self.send(frame.encode_pong(token))

    def on_pong(self, token: int) -> None:
        """Handle the answer to a PING."""

    @abstractmethod
    def on_handshake_bytes(self, data: memoryview) -> memoryview:
        """Handle handshake bytes; set `_ready` at its end. Return the bytes behind it. Raises PlaneError."""

    @abstractmethod
    def on_handshake_failed(self, error: PlaneError) -> None:
        """Close the connection: the peer did not authenticate, or is not the right one."""

    @abstractmethod
    def on_frames(self, frames: list[list[Any]]) -> None:
        """Handle frames in order.

        Raises ProtocolViolation, or the IndexError, TypeError, … that a malformed frame causes.
        """

    # ------------------------------------------------------------------- writing

    def send(self, data: bytes) -> None:
        """Write a frame, with the others of this turn of the event loop."""
        self._out.append(data)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self.flush)
        elif len(self._out) >= EARLY_FLUSH_COUNT:
            self._write_out()

    def send_raw(self, header: bytes, payload: bytes) -> None:
        """Write a header frame and the raw bytes that it announces, at once.

        The bytes are not copied on uvloop, and on asyncio's own loop from Python 3.12. A later sender finds
        the connection paused if the peer does not read fast enough.
        """
        self._out_has_raw = True
        self._out += (header, payload)
        self.flush()

    def mark_dirty(self, sender: Outgoing) -> None:
        """Have the sender's batch written with the next flush, at the latest by `_gather`."""
        self._dirty.append(sender)
        if not self._gathering_turns:
            self._gathering_turns = 1
            self._loop.call_soon(self._gather)

    def _gather(self) -> None:
        """Write the items of a turn of the event loop, or let them wait for the items of the next turns.

        A write costs as much as ten items, and the peer pays the same to wake up. So streams that send items
        in every turn share a write: within `_GATHER_S` of the last write, for `_GATHER_TURNS` turns at most,
        since turns without work cost too. A single stream does not wait: its reader may answer each item.
        """
        if not self._dirty:  # another flush has taken them along
            self._gathering_turns = 0
        elif (
            self._gathering_turns < _GATHER_TURNS
            and len(self.streams) > 1
            and time.monotonic() - self._gathered_at < _GATHER_S
        ):
            self._gathering_turns += 1
            self._loop.call_soon(self._gather)
        else:
            self._gathering_turns = 0
            self._gathered_at = time.monotonic()
            self.flush()

    def flush(self) -> None:
        """Hand all gathered frames and batches to the transport."""
        if self._dirty:
            dirty, self._dirty = self._dirty, []
            for sender in dirty:
                if sender.batch is not None:
                    self._out.append(sender.take_batch())
        self._flush_scheduled = False
        if self._out:
            self._write_out()

    def _write_out(self) -> None:
        """Hand the gathered frames to the transport, in one piece unless a raw payload is among them."""
        out, self._out = self._out, []
        if self.closed:
            return
        if self._out_has_raw:
            self._out_has_raw = False
            self.written_bytes += sum(map(len, out))
            if self._paced is None:
                self.transport.writelines(out)
            else:
                self._paced.write(*out)
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        self.written_bytes += len(data)
        if self._paced is None:
            self.transport.write(data)
        else:
            self._paced.write(data)

    @property
    def unsent_bytes(self) -> int:
        """Bytes written here that have not left for the kernel."""
        held_bytes = 0 if self._paced is None else self._paced.held_bytes
        return held_bytes + self.transport.get_write_buffer_size()

    def add_write_waiter(self, waiter: Waiter) -> None:
        """Wake the waiter once the connection is not paused any more, or has ended."""
        self._blocked.add(waiter)

    def remove_write_waiter(self, waiter: Waiter) -> None:
        """Forget a waiter. Idempotent."""
        self._blocked.discard(waiter)

    # ------------------------------------------------------------------- sweep and keepalive

    def start_sweeping(self) -> None:
        """Sweep from now on, until no stream, no unsent byte and no incomplete frame is left."""
        self.sweeping = True
        self._heard = True
        if self._sweep_handle is not None:
            self._sweep_handle.cancel()
        self._sweep_handle = self._loop.call_later(self._sweep_interval_s, self._sweep)

    def _sweep(self) -> None:
        """Count silence and progress, and act on them: see "Liveness" above."""
        self.sweeps += 1
        unsent_bytes = self.unsent_bytes
        unfinished = self.decoder.unfinished
        if not self.streams and not unsent_bytes and unfinished is None:
            self.sweeping = False
            self._sweep_handle = None
            self.on_idle()
            return
        self._sweep_handle = self._loop.call_later(self._sweep_interval_s, self._sweep)
        heard = self._heard or unsent_bytes < self._unsent_bytes  # a peer that reads is alive, too
        self._silent_sweeps = 0 if heard else self._silent_sweeps + 1
        self._heard = False
        self._unsent_bytes = unsent_bytes
        stuck = unfinished is not None and unfinished == self._unfinished and not self.paused
        if not stuck:
            self._stuck_sweeps = 0
        elif self._silent_sweeps < SWEEPS_PER_INTERVAL:  # else the peer sends nothing at all: silence
            self._stuck_sweeps += 1
        self._unfinished = unfinished
        error = self._verdict(stuck=stuck)
        if error is not None:
            self.fail(error)
            return
        if self._silent_sweeps == self.PING_AT:
            self.send(frame.encode_ping(self.sweeps))
        elif self._silent_sweeps == QUIET_AT:
            self.on_quiet()
        self.on_sweep()

    def _verdict(self, *, stuck: bool) -> PlaneError | None:
        """Return the error to fail the connection with, or None."""
        silent_s = self._silent_sweeps * self._sweep_interval_s
        if self._silent_sweeps >= _CUT_OFF_AT - 1 and _TCP_INFO is not None:
            with contextlib.suppress(OSError, AttributeError):  # the system does not tell; no socket
                sock = self.transport.get_extra_info("socket")
                info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
                if info[_RETRANSMITS_AT] >= _CUT_OFF_RETRANSMITS:
                    return PeerSilent(f"the peer's host has acknowledged nothing for {silent_s:.1f} s")
        if self._silent_sweeps >= self._lost_at:
            if self.streams or not stuck:
                return PeerSilent(f"the peer has been silent for {silent_s:.1f} s")
            return ProtocolViolation(f"a frame has made no progress for {silent_s:.1f} s")
        if self._stuck_sweeps >= _STUCK_AT - 1:
            stuck_s = self._stuck_sweeps * self._sweep_interval_s
            return ProtocolViolation(f"a frame has made no progress for {stuck_s:.1f} s")
        return None

    def note_life(self) -> None:
        """Note that the peer's process has answered on another connection: it is slow, not dead."""
        self._heard = True
        self._stuck_sweeps = 0

    @abstractmethod
    def on_sweep(self) -> None:
        """Do the streams' slow bookkeeping, at each sweep."""

    def on_quiet(self) -> None:
        """Handle a peer that has been silent for `QUIET_AT` sweeps: slow, hanging, or gone."""

    def on_idle(self) -> None:
        """Handle a sweep that found no stream: sweeping has ended."""

    # ------------------------------------------------------------------- the end

    def fail(self, error: PlaneError) -> None:
        """Close because of `error`. The peer gets it in a GOAWAY, unless the connection is lost."""
        if self.closed:
            return
        self.error = error
        self.flush()
        if self._ready and not isinstance(error, ConnectionLost):
            self.send(frame.encode_goaway(error.code, str(error)))
        self.flush()
        self._end(error)
        if isinstance(error, ConnectionLost):
            self.transport.abort()
        else:
            self._linger()

    def close(self) -> None:
        """Close, after the written bytes have left."""
        if not self.closed:
            self.flush()
            self._end(self.error or ConnectionLost("the connection was closed"))
            self._linger()

    def _linger(self) -> None:
        if self._paced is not None:
            self._paced.write_all()
        self.transport.close()
        self._abort_handle = self._loop.call_later(_LINGER_S, self.transport.abort)

    def _end(self, error: PlaneError) -> None:
        """Close once: see "Ends" above."""
        if self.closed:
            return
        self.closed = True
        if self._sweep_handle is not None:
            self._sweep_handle.cancel()
            self._sweep_handle = None
        self.decoder.close()
        self._out.clear()
        self._dirty.clear()
        self.on_closed(error)
        self.resume_writing()

    @abstractmethod
    def on_closed(self, error: PlaneError) -> None:
        """End the open streams with `error`. Called once."""


def unacknowledged_bytes(transport: asyncio.BaseTransport) -> int:
    """Return the bytes that the kernel has taken and the peer's kernel has not acknowledged; 0 where the
    system does not tell."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import fcntl
        import termios

        found = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(found, sys.byteorder)
    return 0


def _token(received: list[Any]) -> int:
    token = received[2]
    if type(token) is not int:
        raise ProtocolViolation("a malformed PING or PONG")
    return token
