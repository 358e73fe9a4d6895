"""Keeping a lease: the writer chain, and the thread that renews the lease and watches the event loop.

The thread has its own connection, so that a busy event loop loses no lease. It renews when `RENEW_AFTER` of
the TTL have passed, which leaves time for two attempts. While the server refuses new connections because of
its limit, the thread renews over the event loop's connections.

It also watches a heartbeat of the event loop. When the loop has stalled for `STALL_TTLS` TTLs, the lease is
kept, but each registered key gets its `stalled_value`, so that clients choose another process. When the loop
has stalled for `DYN_LOOP_STALL_S`, renewal stops and the lease ends. C code that holds the interpreter lock
stops this thread too: then the lease ends after its TTL.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVarTuple

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import LeaseNotFound, StoreError
from dynamo_redis.store.base import LeaseId, Revision
from dynamo_redis.store.keys import ALWAYS_FIT_COUNT, RegistryKeys
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.server_errors import is_full
from dynamo_redis.store.redis.threads import ThreadConnection
from dynamo_redis.store.registry.change_log import is_revision, order
from dynamo_redis.store.registry.scripts_api import (
    KeyValue,
    OtherIncarnation,
    OwnedPut,
    Renewal,
    Wiped,
    encode_write,
    keep_alive,
    new_operation,
    parse_written,
)

logger = logging.getLogger(__name__)
Ts = TypeVarTuple("Ts")

STALL_TTLS: Final = 2.0
RENEW_AFTER: Final = 0.6
"""Part of the remaining TTL after which a lease is renewed: a sixth less work for Redis than at 0.5."""
REFUSED_RETRY_S: Final = 0.5
REFUSED_RETRIES_A_TTL_COUNT: Final = 32
REFUSED_RETRIES_A_SECOND_COUNT: Final = 20_000
"""Limits of the retries of a refused renewal: a time, a number a TTL, and a rate of all processes together.

The service clock stops while a server refuses all writes, so many attempts fit into the lease's time."""
_ATTEMPT: Final = 0.2
"""Longest time of one exchange, as a part of the TTL."""
CLOSE_TIMEOUT_S: Final = 1.0
REMEMBERED_COUNT: Final = 1000


class WriterChain:
    """The writes of a lease by its owner, to compare with the last write that the registry has. Thread-safe.

    The registry keeps `"revision operation previous"` for each lease. `previous` is the operation of the
    write before, or "" for the write with which the lease was granted. There are three cases:

    - The registry names the last write acknowledged here: all is well.
    - It names a write that is under way, or of unknown outcome, and that follows the last acknowledged one:
      that write arrived.
    - It names another write: an acknowledged write was lost in a failover, or the lease has ended and was
      granted again.

    Only the last `REMEMBERED_COUNT` operations are remembered; a forgotten one causes a needless repair.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = ("", "")  # revision and operation
        self._in_flight: set[str] = set()
        self._doubtful: deque[str] = deque(maxlen=REMEMBERED_COUNT)
        self._done: deque[str] = deque(maxlen=REMEMBERED_COUNT)
        self._broken = False
        self._changes = 0

    def begin(self, operation: str) -> None:
        """Note that a write is about to be sent."""
        with self._lock:
            self._in_flight.add(operation)
            self._changes += 1

    def acknowledged(self, operation: str, revision: Revision | None, follows: str | None = None) -> bool:
        """Note the answer to a write; `revision` is None if it changed nothing.

        Return whether `follows`, the operation before it in the registry, is the last one acknowledged here
        (None: unknown, taken as right). If not, `agrees` is False until `settle`.
        """
        with self._lock:
            self._in_flight.discard(operation)
            self._done.append(operation)
            connects = follows is None or follows == self._last[1]
            self._broken = self._broken or not connects
            if revision is not None and order(revision) > order(Revision(self._last[0] or "0-0")):
                self._last = (revision, operation)
            return connects

    def in_doubt(self, operation: str) -> None:
        """Note that the outcome of a write is unknown."""
        with self._lock:
            self._in_flight.discard(operation)
            self._doubtful.append(operation)

    def expects(self, operation: str) -> bool:
        """Return whether an operation in the log is a write under way, or one that was answered."""
        with self._lock:
            return operation in self._in_flight or operation in self._done

    def settle(self, last_write: str) -> None:
        """Accept the registry's last write, after all keys of this lease were compared with the registry."""
        revision, operation, _ = _parse(last_write)
        with self._lock:
            self._last = (revision, operation)
            self._broken = False
            self._doubtful.clear()
            self._changes += 1

    def agrees(self, last_write: str) -> bool:
        """Return whether the registry's last write fits the writes of this process."""
        revision, operation, previous = _parse(last_write)
        with self._lock:
            if self._broken or (revision, operation) == self._last:
                return not self._broken
            may_be = operation in self._in_flight or operation in self._doubtful
            return may_be and previous == self._last[1]

    def observe(self) -> int | None:
        """Return a mark to compare after an exchange; None while a write is in flight."""
        with self._lock:
            return None if self._in_flight else self._changes

    def diverged(self, mark: int | None, last_write: str) -> bool:
        """Return whether an acknowledged write is missing; False if there were writes since `mark`."""
        return mark is not None and mark == self.observe() and not self.agrees(last_write)


def _parse(last_write: str) -> tuple[str, str, str]:
    """Return revision, operation and previous operation; all empty for a text that no script wrote."""
    revision, _, operations = last_write.partition(" ")
    if not is_revision(revision):
        return "", "", ""
    operation, _, previous = operations.partition(" ")
    return revision, operation, previous


class Keepalive:
    """Renews one lease from a thread, from the first `granted` to `aclose`."""

    def __init__(
        self,
        client: StoreClient,
        keys: RegistryKeys,
        lease: LeaseId,
        chain: WriterChain,
        *,
        ttl_s: float,
        loop_stall_s: float,
        on_disturbance: Callable[[str], None],
        on_renewed: Callable[[Renewal], None],
        on_refused: Callable[[StoreError], None],
        on_gone: Callable[[], None],
        stalled_values: Callable[[], Sequence[tuple[str, bytes]]],
    ) -> None:
        """Make a keepalive that is idle until `granted`. The first four callbacks run on the event loop.

        Args:
            loop_stall_s: Stall of the event loop after which the lease is given up; 0: never.
            on_disturbance: Called with a reason when the registered keys must be compared with the registry.
            on_renewed: Called after each renewal.
            on_refused: Called when the server has refused a renewal.
            on_gone: Called when the lease no longer exists.
            stalled_values: Called from the thread: keys and values to write while the event loop hangs.
        """
        self._client = client
        self._keys = keys
        self._lease = lease
        self._chain = chain
        self._ttl_s = ttl_s
        # A hang shorter than the TTL is no reason to give up.
        self._loop_stall_s = max(loop_stall_s, ttl_s) if loop_stall_s else float("inf")
        self._on_disturbance = on_disturbance
        self._on_renewed = on_renewed
        self._on_refused = on_refused
        self._on_gone = on_gone
        self._stalled_values = stalled_values
        self._lock = threading.Lock()  # guards the next four, which both threads write
        self._grant_count = 0
        self._incarnation = ""
        self._deadline = 0.0
        self._renew_at = float("inf")
        self._beat_at = time.monotonic()
        self._hangs = False
        self._marked_stalled = False
        self._gave_up = False
        self._backoff = Backoff(cap_s=ttl_s / 4)
        self._server_moved = False
        self._lease_count = 1
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._connection: ThreadConnection | None = None
        self._step_began_at = float("inf")  # the exchange that the thread may be in
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heartbeat: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ on the event loop

    def granted(self, incarnation: str, sent_at: float) -> None:
        """Keep the lease from now on, which was granted by a call sent at `sent_at` (monotonic)."""
        with self._lock:
            self._grant_count += 1
            self._incarnation = incarnation
            self._deadline = sent_at + self._ttl_s
            self._renew_at = self._renewal_time()
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._beat()
            self._thread = threading.Thread(target=self._run, name="registry keepalive", daemon=True)
            self._thread.start()
        self._wake.set()

    def _beat(self) -> None:
        assert self._loop is not None
        self._beat_at = time.monotonic()
        if self._connection is not None and self._beat_at - self._step_began_at > self._ttl_s:
            self._connection.abort()  # an answer that drips extends each time-out of the thread
        self._heartbeat = self._loop.call_later(self._poll_s, self._beat)

    async def aclose(self) -> None:
        """Stop the thread after its present exchange; wait for that at most `CLOSE_TIMEOUT_S`."""
        self._stopping = True
        self._wake.set()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)

    def _on_move(self) -> None:
        """Renew at once at another server, which may have missed the last renewal. From any thread."""
        with self._lock:
            self._server_moved = True
            if self._renew_at != float("inf"):
                self._renew_at = time.monotonic()
        self._wake.set()

    # ------------------------------------------------------------------ in the thread

    @property
    def _poll_s(self) -> float:
        return min(5.0, self._ttl_s / 4)

    @property
    def _attempt_s(self) -> float:
        return min(self._client.timeout_s, max(0.5, self._ttl_s * _ATTEMPT))

    def _renewal_time(self) -> float:
        now = time.monotonic()
        return now + max(0.0, self._deadline - now) * RENEW_AFTER

    def _run(self) -> None:
        connection = self._client.sync(self._attempt_s, key=self._keys.meta, on_move=self._on_move)
        self._connection, self._step_began_at = connection, time.monotonic()
        try:
            with suppress(StoreError):
                connection.connect()  # so that a refusal shows now, not when the lease is about to end
            self._step_began_at = float("inf")
            while not self._stopping:
                self._wake.wait(max(0.0, min(self._poll_s, self._renew_at - time.monotonic())))
                self._wake.clear()
                if not self._stopping:
                    self._step_began_at = time.monotonic()
                    self._renew_and_watch(connection)
                    self._step_began_at = float("inf")
        finally:
            connection.close()

    def _renew_and_watch(self, connection: ThreadConnection) -> None:
        stalled_s = time.monotonic() - self._beat_at
        try:
            if stalled_s >= self._loop_stall_s:
                self._try_again_in(self._refused_retry_s())  # the lease is given up while this lasts
            elif time.monotonic() >= self._renew_at:
                self._renew(connection)
        except StoreError as exc:
            logger.debug("keepalive: %s", exc)
            if exc.answered:
                self._call_on_loop(self._on_refused, exc)
            self._try_again_in(self._refused_retry_s() if exc.answered else self._backoff.next_s())
        except Exception:
            logger.exception("the lease could not be renewed, trying again")
            self._try_again_in(self._backoff.next_s())
        try:
            self._watch_loop(connection, stalled_s)
        except StoreError as exc:
            logger.debug("marking this process as not ready: %s", exc)
        except Exception:
            logger.exception("this process cannot be marked as not ready, trying again")

    def _refused_retry_s(self) -> float:
        interval_s = min(REFUSED_RETRY_S, self._ttl_s / REFUSED_RETRIES_A_TTL_COUNT)
        interval_s = max(interval_s, self._lease_count / REFUSED_RETRIES_A_SECOND_COUNT)
        return interval_s * random.uniform(0.5, 1)  # noqa: S311 - jitter

    def _try_again_in(self, wait_s: float) -> None:
        if self._server_moved:  # during the attempt that failed
            self._server_moved = False
            wait_s = 0.0
        remaining_s = self._deadline - time.monotonic()
        self._renew_at = time.monotonic() + (min(wait_s, remaining_s / 2) if remaining_s > 0 else wait_s)

    def _renew(self, connection: ThreadConnection) -> None:
        with self._lock:
            grant, incarnation = self._grant_count, self._incarnation
        mark = self._chain.observe()
        self._server_moved = False
        try:
            renewal, sent_at = self._send_renewal(connection, incarnation)
        except (LeaseNotFound, Wiped, OtherIncarnation) as exc:
            with self._lock:
                if grant != self._grant_count:
                    return  # granted again meanwhile: the error concerns the lease before
                # Only the event loop grants it again, together with the keys; `granted` then resumes this.
                self._renew_at = float("inf")
            self._call_on_loop(self._on_gone)
            self._disturb(str(exc))
            return
        self._backoff.reset()
        self._lease_count = renewal.lease_count
        with self._lock:
            if grant == self._grant_count:
                self._deadline = sent_at + self._ttl_s
                self._renew_at = self._renewal_time()
        self._call_on_loop(self._on_renewed, renewal)
        if self._chain.diverged(mark, renewal.last_write):
            self._disturb("the registry lost a write")

    def _send_renewal(self, connection: ThreadConnection, incarnation: str) -> tuple[Renewal, float]:
        """Renew over the thread's own connection, or over the event loop's if the server has no room for it.

        Returns the renewal, and the time at which it was sent."""
        keys, lease, ttl_s, sent_at = self._keys, self._lease, self._ttl_s, time.monotonic()
        try:
            return keep_alive(connection, keys, incarnation, lease, ttl_s), sent_at
        except StoreError as exc:
            if not is_full(exc):  # a server that is away would take the time of the next attempt
                raise
            logger.debug("keepalive: %s; trying the event loop's connections", exc)
        assert self._loop is not None
        shared, sent_at = self._client.from_thread(self._loop, self._attempt_s), time.monotonic()
        return keep_alive(shared, keys, incarnation, lease, ttl_s), sent_at

    def _watch_loop(self, connection: ThreadConnection, stalled_s: float) -> None:
        if stalled_s >= STALL_TTLS * self._ttl_s:
            if not self._hangs:
                self._hangs = True
                logger.warning(
                    "the event loop hangs since %.1f s: marking this process as not ready", stalled_s
                )
            if not self._marked_stalled:
                puts = [OwnedPut(key, value, owned=True) for key, value in self._stalled_values()]
                for start in range(0, len(puts), ALWAYS_FIT_COUNT):
                    self._write_from_thread(connection, puts[start : start + ALWAYS_FIT_COUNT])
                self._marked_stalled = True
        elif self._hangs:
            self._hangs = self._marked_stalled = self._gave_up = False
            logger.warning("the event loop is back")
            self._disturb("the event loop was hanging")
        if stalled_s >= self._loop_stall_s and not self._gave_up:
            self._gave_up = True
            logger.error("the event loop hangs since %.1f s: giving up the lease", stalled_s)

    def _write_from_thread(self, connection: ThreadConnection, puts: Sequence[OwnedPut]) -> None:
        operation = new_operation()
        self._chain.begin(operation)
        try:
            answer = connection.script(
                KeyValue.WRITE,
                (*self._keys.structures, self._keys.lease(self._lease)),
                encode_write(self._incarnation, operation, "", self._lease, 0.0, (), puts),
            )
            written = parse_written((), answer)
        except (LeaseNotFound, Wiped, OtherIncarnation):
            self._chain.acknowledged(operation, None)
        except StoreError:
            self._chain.in_doubt(operation)
            raise
        else:
            revision = written.revision if written.change_count else None
            self._chain.acknowledged(operation, revision, written.follows)

    def _disturb(self, reason: str) -> None:
        self._call_on_loop(self._on_disturbance, reason)

    def _call_on_loop(self, call: Callable[[*Ts], None], *arguments: *Ts) -> None:
        """Call a function on the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            logger.debug("the event loop has closed")
