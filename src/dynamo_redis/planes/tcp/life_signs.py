"""Signs of life of a worker whose event loop is busy, and the question of a caller for one.

A handler may hold the event loop for seconds, and then the loop answers no PING. So a thread watches the
listening sockets. It accepts a connection that the loop has not accepted for `_PATIENCE_S`. If that asks for
a sign of life, the thread answers; otherwise it hands the connection to the loop. A loop that accepts such a
question itself is not busy, and closes it: the loop answers PINGs. A process that is stopped, or whose
interpreter is held by C code, runs no thread and answers nothing. A loop that hangs for `DYN_LOOP_STALL_S` is
taken for lost: the thread answers no more, and callers take the process for dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Final

from dynamo_redis.planes.address import parse_address
from dynamo_redis.wire.handshake import (
    MAX_MESSAGE_BYTES,
    NONCE_BYTES,
    answer_to,
    is_life_answer,
    is_life_question,
    life_question,
)

_PATIENCE_S: Final = 0.25
"""Seconds that the event loop may take to accept a connection, and a caller to send its first bytes, before
the thread acts without them."""
_JOIN_S: Final = 2.0


class LifeThread:
    """Accepts connections in place of a busy event loop, and answers questions for a sign of life."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listening: list[socket.socket],
        answer: Callable[[socket.socket], bool],
        on_socket: Callable[[socket.socket], None],
        *,
        max_taken_count: int,
        loop_stall_s: float,
    ) -> None:
        """Start the thread.

        Args:
            loop: the event loop in whose place the thread accepts.
            listening: the listening sockets, which the loop watches, too.
            answer: answers and closes a connection that asks for a sign of life, on the thread; returns False
                for other connections.
            on_socket: gets the other connections, on the event loop.
            max_taken_count: the most connections that wait for the event loop; more stay in the backlog.
            loop_stall_s: seconds after which a hanging loop gets no more answers; 0: it always does.
        """
        self._loop = loop
        self._listening = listening
        self._answer = answer
        self._on_socket = on_socket
        self._max_taken_count = max_taken_count
        self._loop_stall_s = loop_stall_s or math.inf
        self._busy_since: float | None = None
        """The time at which the thread first acted in place of the event loop, which has not run since."""
        self._taken_count = 0  # counted on the thread
        self._handed_on_count = 0  # counted on the event loop
        self._variables = copy_context()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="sign of life", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Call it before the listening sockets are closed. Idempotent."""
        if self._waker.fileno() >= 0:
            self._waker.shutdown(socket.SHUT_RDWR)  # wakes the thread even if a forked child has a copy
            self._waker.close()
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        """Watch the listening sockets, and the accepted ones until their first bytes; the loop of the
        thread."""
        waiting: dict[socket.socket, float] = {}
        with self._wake, selectors.DefaultSelector() as selector, selectors.DefaultSelector() as stop:
            stop.register(self._wake, selectors.EVENT_READ)
            for sock in (self._wake, *self._listening):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                timeout_s = max(0.0, min(waiting.values()) - time.monotonic()) if waiting else None
                ready = {key.fileobj for key, _ in selector.select(timeout_s)}
                if self._wake in ready:
                    break
                now = time.monotonic()
                for sock, give_up_at in tuple(waiting.items()):
                    if sock in ready or now >= give_up_at:
                        selector.unregister(sock)
                        del waiting[sock]
                        self._decide(sock)
                pending = [sock for sock in self._listening if sock in ready]
                if pending and stop.select(_PATIENCE_S):
                    break
                for listening in pending:
                    for sock in self._accept(listening):
                        selector.register(sock, selectors.EVENT_READ)
                        waiting[sock] = time.monotonic() + _PATIENCE_S
        for sock in waiting:
            sock.close()

    def _accept(self, listening: socket.socket) -> list[socket.socket]:
        """Accept the connections that the event loop has left."""
        taken: list[socket.socket] = []
        with contextlib.suppress(OSError):  # none is left, or no file for it: the loop logs that
            while self._taken_count - self._handed_on_count < self._max_taken_count:
                sock, _ = listening.accept()
                sock.setblocking(False)
                self._taken_count += 1
                taken.append(sock)
        return taken

    def _decide(self, sock: socket.socket) -> None:
        """Answer an accepted connection, or hand it to the event loop."""

        def note_turn() -> None:
            """Note on the event loop that it runs."""
            self._busy_since = None

        def hand_on() -> None:
            """Take over the connection on the event loop."""
            self._handed_on_count += 1
            if self._waker.fileno() >= 0:
                self._on_socket(sock)
            else:
                sock.close()

        try:
            now = time.monotonic()
            busy_since = self._busy_since  # read once: the event loop may reset it at any moment
            if busy_since is None:
                busy_since = self._busy_since = now
                self._loop.call_soon_threadsafe(note_turn, context=self._variables)
            hangs = now - busy_since > self._loop_stall_s
            if not hangs and self._answer(sock):
                self._taken_count -= 1
            else:
                self._loop.call_soon_threadsafe(hand_on, context=self._variables)
        except RuntimeError:  # the event loop has ended
            sock.close()


def answer_question(sock: socket.socket, secret: bytes | None, instance_id: int) -> bool:
    """Answer and close a connection whose first bytes ask for a sign of life.

    Return False if they do not; then they stay unread. Never waits.
    """
    try:
        answer = answer_to(sock.recv(2 + MAX_MESSAGE_BYTES, socket.MSG_PEEK), secret, instance_id)
        if answer is None:
            return False
        sock.recv(2 + MAX_MESSAGE_BYTES)  # unread bytes at the close would make the kernel reset it
        sock.send(answer)
    except OSError:
        return False
    sock.close()
    return True


def asks_for_life(sock: socket.socket) -> bool:
    """Return whether the first bytes of a connection ask for a sign of life. They stay unread. Never
    waits."""
    try:
        return is_life_question(sock.recv(2 + MAX_MESSAGE_BYTES, socket.MSG_PEEK))
    except OSError:
        return False


async def ask_for_life(address: str, secret: bytes | None, instance_id: int) -> bool:
    """Ask for a sign of life. Return True if the instance's process lives and its event loop is busy.

    Has no time-out of its own. Raises OSError or ValueError.
    """
    host, port = parse_address(address.partition("+")[0])
    nonce = secrets.token_bytes(NONCE_BYTES)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(life_question(instance_id, nonce))
        return is_life_answer(await reader.read(MAX_MESSAGE_BYTES), secret, instance_id, nonce)
    finally:
        writer.transport.abort()
