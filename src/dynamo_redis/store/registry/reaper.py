"""Reaping ended leases: by ticks, and by hints that a lease's key has expired.

A tick is one script call that reaps a bounded number of leases. All processes together tick about 4 times a
second with up to `LISTENERS_COUNT` leases, and about 16 times with more. Each process ticks every `TICK_S`
while there are few leases, and less often the more there are. Their number is known from the last tick or
renewal, and thousands may have died since. So a process that finds that the last tick was too long ago ticks
every `TICK_S` itself. Renewals of the own lease show that time, too.

Expiry notifications shorten the delay where there are few processes; they may be late, lost or switched off.
Where there are many processes, ticks are as fast, and each notification would go to every process. So none
subscribes then.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from dynamo_redis.backoff import Backoff
from dynamo_redis.errors import StoreError, StoreRefused
from dynamo_redis.store.base import LeaseId
from dynamo_redis.store.keys import parse_lease
from dynamo_redis.store.redis.health import Health
from dynamo_redis.store.redis.subscription import ChannelSubscription
from dynamo_redis.store.registry.change_log import Change
from dynamo_redis.store.registry.scripts_api import KeyValue, Renewal, Tick
from dynamo_redis.supervision import Supervisor

logger = logging.getLogger(__name__)

TICK_S: Final = 0.5
SHARED_BY_COUNT: Final = 8
"""Number of leases from which on ticks become rarer in each process."""
SHARED_BY_LISTENERS_COUNT: Final = 2
"""The same where processes listen to notifications, which come sooner and cost an idle Redis less."""
LEASELESS_TICK_S: Final = 5.0
"""Longest pause of a process without a lease, which makes no renewals."""
LISTENERS_COUNT: Final = 16
"""Number of leases up to which processes listen to notifications; above twice as many they stop."""
HINT_WAIT_S: Final = 0.05
POLL_S: Final = 2.0
REMEMBERED_LEASES_COUNT: Final = 1024
FLAGS: Final = "Kxe"
ENDINGS: Final = (b"expired", b"del", b"evicted")


class Pace:
    """The pause between two ticks, computed from the last state seen of the registry. Pure."""

    def __init__(self) -> None:
        self.lease_count = 1
        self._is_alone = True
        self._has_lease = False

    def ticked(self, tick: Tick) -> None:
        """Note the result of a tick of this process."""
        self.lease_count = tick.lease_count
        self._is_alone = self._is_overdue(tick.idle_s)

    def renewed(self, renewal: Renewal) -> bool:
        """Note the result of a renewal of this process's lease. Return whether a tick is overdue."""
        self.lease_count, self._has_lease = renewal.lease_count, True
        return self._is_overdue(renewal.idle_s)

    @property
    def interval_s(self) -> float:
        """The next pause in seconds, before jitter."""
        if self._is_alone:
            return TICK_S
        shared_by_count = SHARED_BY_LISTENERS_COUNT if self._listens else SHARED_BY_COUNT
        shared_s = TICK_S * max(1.0, self.lease_count / shared_by_count)
        return shared_s if self._has_lease else min(shared_s, LEASELESS_TICK_S)

    @property
    def _listens(self) -> bool:
        return self.lease_count <= LISTENERS_COUNT

    def _is_overdue(self, idle_s: float) -> bool:
        """Return whether a time without a tick is too long: two to four times the usual pause."""
        return idle_s >= (TICK_S if self._listens else TICK_S / 2)


class Reaper:
    """Two tasks from `start` to `aclose`. `on_tick` is called with the number of processes that hold a lease.

    Every process makes ticks, which are writes, all the time: they show `health` whether writes are taken.
    """

    def __init__(self, kv: KeyValue, health: Health, on_tick: Callable[[int], None]) -> None:
        self._kv = kv
        self._health = health
        self._on_tick = on_tick
        self._pace = Pace()
        self._ended: deque[LeaseId | None] = deque(maxlen=REMEMBERED_LEASES_COUNT)
        self._overdue = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._supervisor = Supervisor(logger, "registry ticks and hints")

    def start(self) -> None:
        """Start ticking and listening."""
        self._tasks = [
            asyncio.create_task(self._tick_on(), name="registry ticks"),
            asyncio.create_task(self._listen_on(), name="registry hints"),
        ]

    async def aclose(self) -> None:
        """Stop both tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def note(self, changes: Sequence[Change]) -> None:
        """Remember the leases that have ended according to the log: hints about them need no tick."""
        self._ended.extend({change.lease for change in changes if change.kind in ("x", "r")})

    def renewed(self, renewal: Renewal) -> None:
        """Note a renewal of the own lease; tick soon if no process has ticked for too long."""
        self._health.wrote("renewal", full=renewal.full)
        if self._pace.renewed(renewal):
            self._overdue.set()
        self._on_tick(renewal.lease_count)

    # ------------------------------------------------------------------ ticks

    async def _tick_on(self) -> None:
        while True:
            pause_s = self._pace.interval_s * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
            try:
                async with asyncio.timeout(pause_s):
                    await self._overdue.wait()
            except TimeoutError:
                pass
            self._overdue.clear()
            try:
                await self._tick()
            except StoreError as exc:
                logger.debug("tick: %s", exc)
            except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                self._supervisor.failed(exc)

    async def _tick(self) -> None:
        """Reap until nothing is overdue."""
        try:
            tick = await self._kv.tick()
        except StoreError as exc:
            self._health.refused("tick", exc)
            raise
        self._health.wrote("tick", full=tick.full)
        self._pace.ticked(tick)
        while tick.overdue_count:
            tick = await self._kv.tick()
        self._pace.lease_count = tick.lease_count
        self._on_tick(tick.lease_count)

    # ------------------------------------------------------------------ hints

    async def _listen_on(self) -> None:
        backoff = Backoff()
        while True:
            if self._pace.lease_count > LISTENERS_COUNT:
                await asyncio.sleep(POLL_S)
                continue
            subscription: ChannelSubscription | None = None
            try:
                await self._allow_notifications()
                subscription = await self._kv.client.subscribe(
                    self._kv.keys.lease_channel, beside=self._kv.keys.meta
                )
                await self._tick()  # for leases that ended before the subscription
                backoff.reset()
                while self._pace.lease_count <= 2 * LISTENERS_COUNT:
                    message = await subscription.next_message(POLL_S)
                    if message is not None and message[1] in ENDINGS:
                        await self._follow_hint(message[0])
            except StoreError as exc:
                logger.debug("hints: %s", exc)
            except Exception as exc:  # noqa: BLE001 - logged, with its traceback
                self._supervisor.failed(exc)
            finally:
                if subscription is not None:
                    await subscription.aclose()
            await self._kv.client.pause(backoff.next_s())

    async def _follow_hint(self, channel: bytes) -> None:
        """Tick, unless the log shows that another process has reaped the lease of that channel already."""
        try:
            lease = parse_lease(channel.rpartition(b":")[2])
        except ValueError:
            lease = None
        if lease not in self._ended:
            await asyncio.sleep(random.uniform(0, HINT_WAIT_S))  # noqa: S311 - another process may tick first
        if lease not in self._ended:
            await self._tick()

    async def _allow_notifications(self) -> None:
        """Switch on the notifications that hints need, in addition to those in use, if that is allowed."""
        client, meta = self._kv.client, self._kv.keys.meta
        try:
            reply = await client.execute("CONFIG", "GET", "notify-keyspace-events", beside=meta)
            flags = reply[1].decode() if reply else ""
            wanted = "K" if "A" in flags else FLAGS
            missing = "".join(flag for flag in wanted if flag not in flags)
            if missing:
                await client.execute("CONFIG", "SET", "notify-keyspace-events", flags + missing, beside=meta)
        except StoreRefused as exc:
            logger.debug("expiry notifications stay as they are: %s", exc)
