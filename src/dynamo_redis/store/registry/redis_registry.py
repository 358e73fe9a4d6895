"""The registry on Redis: connects its parts, starts and stops them.

Long-lived parts, all started by `start` (the keepalive by the first `register`) and stopped by `aclose`:

    log reader    task    follows the change log on a connection of its own, feeds the watches
    reaper        2 tasks ticks, and expiry notifications on a connection of their own
    repair        task    writes registered keys again after a loss
    keepalive     thread  renews the lease on a connection of its own
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from dynamo_redis.config import StoreSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.histogram import HistogramReading
from dynamo_redis.names import new_instance_id
from dynamo_redis.store.base import LeaseId, LostReason, Registration, Revision, Watch
from dynamo_redis.store.keys import RegistryKeys, check_key, check_prefix
from dynamo_redis.store.redis.base import StoreClient
from dynamo_redis.store.redis.client import CLOSE_TIMEOUT_S
from dynamo_redis.store.redis.health import Health
from dynamo_redis.store.redis.opening import open_client
from dynamo_redis.store.registry.change_log import Change, check_revision
from dynamo_redis.store.registry.lease import Keepalive, WriterChain
from dynamo_redis.store.registry.log_reader import LogReader, spread_s
from dynamo_redis.store.registry.operations import KeyOperations
from dynamo_redis.store.registry.reaper import Reaper
from dynamo_redis.store.registry.registrations import Registrations
from dynamo_redis.store.registry.scripts_api import KeyValue

logger = logging.getLogger(__name__)


class RedisRegistry(KeyOperations):
    """See `base.Registry`. Raises ConfigError if the settings name no server, or one that cannot be used."""

    def __init__(self, settings: StoreSettings, *, instance_id: LeaseId | None = None) -> None:
        self._lease = LeaseId(new_instance_id()) if instance_id is None else instance_id
        self._client = open_client(
            settings.require_url(),
            timeout_s=settings.command_timeout_s,
            client_name=f"dynamo-redis:{self._lease:x}",
            login=settings.login(),
        )
        keys = RegistryKeys(settings.prefix)
        chain = WriterChain()
        self._kv = KeyValue(self._client, keys)
        super().__init__(self._kv)
        self._health = Health(self._client.address)

        def on_changes(changes: Sequence[Change]) -> None:
            self._reaper.note(changes)
            self._registrations.note(changes)

        self._reader = LogReader(
            self._kv, self._health, on_changes=on_changes, on_disturbance=self._on_disturbance
        )
        self._reaper = Reaper(self._kv, self._health, self._reader.note_process_count)
        self._registrations = Registrations(
            self._kv,
            self._lease,
            settings.lease_ttl_s,
            chain,
            on_grant=lambda incarnation, sent_at: self._keepalive.granted(incarnation, sent_at),
            spread_s=lambda: spread_s(self._reader.process_count),
        )
        self._keepalive = Keepalive(
            self._client,
            keys,
            self._lease,
            chain,
            ttl_s=settings.lease_ttl_s,
            loop_stall_s=settings.loop_stall_s,
            on_disturbance=self._on_disturbance,
            on_renewed=self._reaper.renewed,
            on_refused=partial(self._health.refused, "renewal"),
            on_gone=partial(self._health.wrote, "renewal"),
            stalled_values=self._registrations.stalled_values,
        )
        self._ttl_s = settings.lease_ttl_s
        self._started = False
        self._closed = False

    def __repr__(self) -> str:
        state = "away" if not self.connected else "refuses writes" if self.write_refusal else "connected"
        return (
            f"<RedisRegistry {self._client.address} {self._kv.keys.prefix!r} lease {self._lease:x} {state}>"
        )

    # ------------------------------------------------------------------ state and life

    @property
    def client(self) -> StoreClient:
        """The client that it uses, for the other parts of the store. It is closed with the registry."""
        return self._client

    @property
    def lease_id(self) -> LeaseId:
        return self._lease

    @property
    def lease_ttl_s(self) -> float:
        return self._ttl_s

    @property
    def connected(self) -> bool:
        return self._health.connected

    @property
    def write_refusal(self) -> str | None:
        return self._health.write_refusal

    @property
    def process_count(self) -> int:
        return self._reader.process_count

    @property
    def lease_losses(self) -> int:
        return self._registrations.lease_losses

    @property
    def outages(self) -> int:
        return self._health.outage_count

    @property
    def trips(self) -> HistogramReading:
        return self._client.trips_s.read()

    async def start(self) -> None:
        if self._started:
            return
        try:
            await self._client.connect()
            position = await self._kv.initialize()
        except BaseException:
            self._client.disconnect()  # the next attempt resolves the name again
            raise
        self._started = True
        self._health.succeeded()
        self._registrations.start(position.incarnation)
        self._reader.start(position)
        self._reaper.start()

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        # A server that has not answered the last write gets less time.
        limit_s = self._client.timeout_s if self._registrations.settled else CLOSE_TIMEOUT_S
        await self._registrations.aclose()

        async def revoke() -> None:
            try:
                async with asyncio.timeout(limit_s):
                    await self._kv.revoke(self._lease)
            except TimeoutError:
                logger.warning("the lease could not be revoked within %g s, it ends with its TTL", limit_s)
            except StoreError as exc:
                logger.warning("the lease could not be revoked, it ends with its TTL: %s", exc)

        parts = [self._keepalive.aclose(), self._reaper.aclose(), self._reader.aclose()]
        if self._started and self._registrations.held:
            parts.append(revoke())
        try:
            await asyncio.gather(*parts)
        finally:
            await self._client.aclose()

    # ------------------------------------------------------------------ kept keys and watches

    async def register(
        self,
        key: str,
        value: bytes,
        *,
        exclusive: bool = False,
        stalled_value: bytes | None = None,
        prepare: Callable[[], Awaitable[None]] | None = None,
        on_lost: Callable[[LostReason], None] | None = None,
    ) -> Registration:
        return await self._registrations.register(
            check_key(key),
            value,
            exclusive=exclusive,
            stalled_value=stalled_value,
            prepare=prepare,
            on_lost=on_lost,
        )

    def watch(self, prefix: str, *, start_revision: Revision | None = None) -> Watch:
        start = None if start_revision is None else check_revision(start_revision)
        return self._reader.watch(check_prefix(prefix), start)

    # ------------------------------------------------------------------ connections between the parts

    def _on_disturbance(self, reason: str) -> None:
        self._registrations.disturb(reason)
