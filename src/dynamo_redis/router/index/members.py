"""Which workers' blocks count: those of instances that the registry lists, or that still answer."""

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
"""How long an instance is believed that was heard of and is not listed: its record may be on its way."""


class Members:
    """Follows the instances of the workers' `kv_dump` endpoint, in one task, until `aclose`.

    An instance that leaves the view loses its blocks; suspects, those that are down for the moment and those
    that hang have not left. One that is listed and not known is asked, once the past has been read
    (`begin`). One that was started anew under its old id is asked, too.
    """

    def __init__(self, ledger: Ledger, recovery: Recovery, client: Client) -> None:
        self._ledger = ledger
        self._recovery = recovery
        self._client = client
        self._listed: set[int] = set()
        self._started_at: dict[int, float] = {}
        self._unlisted_at: dict[int, float] = {}
        self._begun = False
        self._task: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, "KV workers")

    def start(self) -> None:
        """Begin to follow."""
        self._look()
        self._task = asyncio.create_task(self._supervisor.run(self._follow), name="follow KV workers")

    def begin(self) -> None:
        """The past has been read: who is not listed now is gone; from now on who is not known is asked."""
        self._begun = True
        self._look()
        for instance_id in set(self._ledger.instance_ids()) - self._listed:
            self._forget(instance_id)

    def miss(self, instance_id: int) -> None:
        """Something of that instance is missing: ask it, or if there is nobody to ask, drop its blocks."""
        if instance_id in self._listed:
            self._recovery.ask(instance_id)
        else:
            self._ledger.lose(instance_id)

    async def aclose(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await self._client.wait_for_change(TICK_S)
            self._look()

    def _look(self) -> None:
        listed = set(self._client.known_ids())
        for instance_id in self._listed - listed:
            self._forget(instance_id)
        self._listed = listed
        self._ask_restarted()
        if self._begun:
            self._ask_unknown()
        self._drop_unlisted()

    def _ask_restarted(self) -> None:
        for instance in self._client.instances():
            before = self._started_at.setdefault(instance.instance_id, instance.started_at)
            if before != instance.started_at:
                self._started_at[instance.instance_id] = instance.started_at
                self._recovery.ask(instance.instance_id)

    def _ask_unknown(self) -> None:
        asking = set(self._recovery.asking())
        for instance_id in self._listed - asking:
            if self._ledger.standing(instance_id) is not Standing.EXACT:
                self._recovery.ask(instance_id)

    def _drop_unlisted(self) -> None:
        now = time.monotonic()
        unlisted = set(self._ledger.instance_ids()) - self._listed
        self._unlisted_at = {i: self._unlisted_at.get(i, now) for i in unlisted}
        if self._begun:
            for instance_id, since in tuple(self._unlisted_at.items()):
                if now - since > UNLISTED_S:
                    self._forget(instance_id)

    def _forget(self, instance_id: int) -> None:
        self._recovery.forget(instance_id)
        self._ledger.forget(instance_id)
        self._started_at.pop(instance_id, None)
        self._unlisted_at.pop(instance_id, None)
