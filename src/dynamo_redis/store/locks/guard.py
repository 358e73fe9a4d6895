"""Guards a block of code by a lease: renews the lease, and cancels the block when the lease is lost.

The lease's end is computed on this process's monotonic clock, from a time *before* the call that acquired or
renewed it was sent. The server starts to count later, when the call arrives. So the end is known here even if
the server or the network fails. A tenth of the TTL is reserved for cancelling the block.

Cancellation works as in `asyncio.timeout`: the task that entered the block is cancelled. When the block ends,
that request is withdrawn. It becomes LockLost only if the task was not cancelled from elsewhere as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Self

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import LockLost

log = logging.getLogger(__name__)

LEASE_SHARE: Final = 0.9
"""Usable part of a TTL; the rest is reserved for cancelling the guarded block."""


class LeaseGuard:
    """Runs one `async with` block, in the task that enters it, while a lease lasts.

    `renew` makes one attempt and returns False if the lease has ended or has another owner. It is called each
    third of the TTL, in a task that ends with the block. An attempt that fails, or has not ended after
    `attempt_s`, is repeated until the lease has ended.

    Raises LockLost if the lease was lost before the block ended, unless the block raises another exception or
    its task was also cancelled from elsewhere.
    """

    def __init__(
        self,
        name: str,
        *,
        ttl_s: float,
        sent_at: float,
        attempt_s: float,
        renew: Callable[[], Awaitable[bool]],
    ) -> None:
        """`sent_at`: when (monotonic) the call that acquired the lease was sent."""
        self._name = name
        self._ttl_s = ttl_s
        self._attempt_s = attempt_s
        self._renew = renew
        self._sent_at = sent_at
        self._reason: str | None = None
        self._is_cancelling = False
        self._cancelled = False
        self._released = False
        self._task: asyncio.Task[object] | None = None
        self._cancelling_count = 0
        self._renewal: asyncio.Task[None] | None = None
        self._pending: asyncio.Handle | None = None  # the deadline's timer, then the cancellation

    @property
    def lost(self) -> str | None:
        """The reason why the lease is not held; None while it is held. A reason never changes back."""
        if self._reason is None and time.monotonic() >= self._deadline:
            self._reason = f"not renewed within {LEASE_SHARE:.0%} of its TTL of {self._ttl_s:g} s"
        return self._reason

    @property
    def released(self) -> bool:
        """True if the block ended while the lease was still held."""
        return self._released

    def lose(self, reason: str) -> None:
        """Note that the lease is lost: cancel the block, once, unless it ends first."""
        self._reason = self._reason or reason
        if self._pending is not None and not self._is_cancelling:
            self._is_cancelling = True
            self._pending.cancel()
            # Soon, not now: the caller may be the block itself, which gets an exception anyway.
            self._pending = asyncio.get_running_loop().call_soon(self._cancel)

    async def __aenter__(self) -> Self:

        async def renew_until_lost() -> None:
            backoff = Backoff(cap_s=self._ttl_s / 10)
            wait_s = self._sent_at + self._ttl_s / 3 - time.monotonic()
            while self.lost is None:
                await asyncio.sleep(wait_s)
                sent_at = time.monotonic()
                try:
                    async with asyncio.timeout(self._attempt_s):
                        renewed = await self._renew()
                except Exception as exc:  # noqa: BLE001 - the deadline holds after any failure
                    log.debug("lock %s is not renewed: %r", self._name, exc)
                    wait_s = backoff.next_s()
                    continue
                if not renewed:
                    self.lose("it ended on the server, or has another holder")
                else:
                    self._sent_at = sent_at
                    wait_s = sent_at + self._ttl_s / 3 - time.monotonic()
                    backoff.reset()

        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling_count = task.cancelling()
        self._watch_deadline()
        self._renewal = asyncio.create_task(renew_until_lost(), name=f"renew lock {self._name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None
        assert self._pending is not None
        assert self._renewal is not None
        lost = self.lost
        self._released = lost is None
        self._reason = lost or "it was released"
        self._pending.cancel()
        self._pending = None
        # Every requested cancellation must be withdrawn, also one that the block has suppressed.
        also_cancelled_elsewhere = self._cancelled and self._task.uncancel() > self._cancelling_count
        self._renewal.cancel()
        await asyncio.wait([self._renewal])
        is_our_cancellation = (
            isinstance(exc, asyncio.CancelledError) and self._cancelled and not also_cancelled_elsewhere
        )
        if lost is not None and (exc is None or is_our_cancellation):
            raise LockLost(self._name, lost) from exc

    @property
    def _deadline(self) -> float:
        return self._sent_at + LEASE_SHARE * self._ttl_s

    def _watch_deadline(self) -> None:
        def check() -> None:
            reason = self.lost
            if reason is None:  # the loop's clock is coarser than that of the deadline: the timer fired early
                self._watch_deadline()
            else:
                self.lose(reason)

        left_s = self._deadline - time.monotonic()
        self._pending = asyncio.get_running_loop().call_later(max(0.0, left_s), check)

    def _cancel(self) -> None:
        assert self._task is not None
        log.warning("lock %s is lost, cancelling what it guards: %s", self._name, self._reason)
        self._cancelled = True
        self._task.cancel()
