"""Follows the instances whose blocks count: those that the registry lists, or that still answer."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from dynamo_redis.router.index.ledger import Ledger, Standing
from dynamo_redis.router.index.recovery import Recovery
from dynamo_redis.runtime.client import Client
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

TICK_S: Final = 1.0
UNLISTED_S: Final = 5.0
"""Longest time that the events of an instance count before it is listed: its record may be on its way."""


class Members:
    """Follows the instances of the workers' `kv_dump` endpoint, in one task, until `aclose`.

    An instance that leaves the view loses its blocks; suspects, instances that are down for the moment, and
    instances that hang have not left. An instance that is listed and not known exactly is asked, once the
    earlier events have been read (`note_caught_up`). An instance that was started anew under its old id is
    asked, too.
    """

    def __init__(self, ledger: Ledger, recovery: Recovery, client: Client) -> None:
        self._ledger = ledger
        self._recovery = recovery
        self._client = client
        self.listed: set[int] = set()
        """The instances that count now. Another object after each look at the view."""
        self._started_at: dict[int, float] = {}
        self._unlisted_at: dict[int, float] = {}
        self._has_caught_up = False
        self._task: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, "KV workers")

    def start(self) -> None:
        """Begin to follow."""

        async def follow() -> None:
            while True:
                await self._client.wait_for_change(TICK_S)
                self._compare()

        self._compare()
        self._task = asyncio.create_task(self._supervisor.run(follow), name="follow KV workers")

    def note_caught_up(self) -> None:
        """Note that the earlier events have been read: forget instances that are not listed, and from now
        on ask listed instances that are not known exactly."""
        self._has_caught_up = True
        self._compare()
        for instance_id in set(self._ledger.instance_ids()) - self.listed:
            self._forget(instance_id)

    def recover(self, instance_id: int) -> None:
        """Ask an instance of which events are missing; drop its blocks if it is not listed."""
        if instance_id in self.listed:
            self._recovery.ask(instance_id)
        else:
            self._ledger.lose(instance_id)

    async def aclose(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _compare(self) -> None:
        """Compare the listed instances with the known ones: forget those that left, ask those that were
        started anew or are not known exactly, and forget those that have not been listed for too long."""
        listed = set(self._client.known_ids())
        for instance_id in self.listed - listed:
            self._forget(instance_id)
        self.listed = listed
        for instance in self._client.instances():
            before = self._started_at.setdefault(instance.instance_id, instance.started_at)
            if before != instance.started_at:
                self._started_at[instance.instance_id] = instance.started_at
                self._recovery.ask(instance.instance_id)
        if self._has_caught_up:
            asking = set(self._recovery.asking())
            for instance_id in self.listed - asking:
                if self._ledger.standing(instance_id) is not Standing.EXACT:
                    self._recovery.ask(instance_id)
        now = time.monotonic()
        unlisted = set(self._ledger.instance_ids()) - self.listed
        self._unlisted_at = {i: self._unlisted_at.get(i, now) for i in unlisted}
        if self._has_caught_up:
            for instance_id, since in tuple(self._unlisted_at.items()):
                if now - since > UNLISTED_S:
                    self._forget(instance_id)

    def _forget(self, instance_id: int) -> None:
        self._recovery.forget(instance_id)
        self._ledger.forget(instance_id)
        self._started_at.pop(instance_id, None)
        self._unlisted_at.pop(instance_id, None)
