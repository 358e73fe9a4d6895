"""An endpoint while it is served: on the request plane, and with a record in the registry."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from dynamo_redis.config import SystemSettings
from dynamo_redis.errors import StoreError
from dynamo_redis.names import format_instance_id
from dynamo_redis.planes.base import RequestPlaneServer
from dynamo_redis.runtime.handlers import AnyHandler, adapt
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.service import Service, StatsHandler
from dynamo_redis.runtime.shutdown import ShutdownDeadline
from dynamo_redis.runtime.system.canary import Canary
from dynamo_redis.runtime.system.labels import Labels
from dynamo_redis.runtime.tracing import in_request
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import LostReason, Registration, Registry

log = logging.getLogger(__name__)


class ServedEndpoint:
    """One endpoint of this process, open for requests."""

    def __init__(
        self,
        server: RequestPlaneServer,
        registry: Registry,
        instance: Instance,
        *,
        graceful_shutdown: bool,
        shutdown: ShutdownDeadline,
        service: Service,
        metrics_labels: Labels = (),
    ) -> None:
        self.instance = instance
        self.metrics_labels = metrics_labels
        self.closed = False
        self._server = server
        self._subject = instance.name.subject(instance.instance_id)
        self._graceful_shutdown = graceful_shutdown
        self._shutdown = shutdown
        self._service = service
        self._registry = registry
        self._registration: Registration | None = None
        self._unhealthy: str | None = None
        self._record_is_ready = True
        self._canary: asyncio.Task[None] | None = None
        self._updating: asyncio.Task[None] | None = None

    async def start(
        self,
        handler: AnyHandler,
        stats_handler: StatsHandler | None = None,
        *,
        is_bidirectional: bool = False,
        health_check_payload: Any = None,
        settings: SystemSettings,
    ) -> None:
        """Open the endpoint for requests, then register it. If that raises StoreError, it is closed again.

        A `health_check_payload` is sent to the handler while it is idle, if `settings` have that enabled.
        """
        adapted = adapt(handler)
        name, instance_id = str(self.instance.name), format_instance_id(self.instance.instance_id)
        observed = in_request(adapted, name, {"rpc.method": name, "dynamo.instance.id": instance_id})
        self._server.register(self._subject, observed, request_stream=is_bidirectional)
        self._service.add(self.instance, stats_handler)
        try:
            await self.announce()
        except BaseException:
            self._service.remove(self.instance)
            await self._server.unregister(self._subject, grace_s=0)
            raise
        if settings.health_check_enabled and health_check_payload is not None:
            canary = Canary(
                adapted,
                health_check_payload,
                lambda: self._server.stats(self._subject),
                wait_s=settings.canary_wait_s,
                timeout_s=settings.health_check_timeout_s,
            )
            self._canary = asyncio.create_task(
                canary.run(self._note_canary), name=f"canary of {self._subject}"
            )

    async def announce(self) -> None:
        """Register the record, unless it is registered. Raises StoreError."""
        if self._registration is not None and self._registration.lost is None:
            return

        def on_lost(reason: LostReason) -> None:
            log.warning(
                "instance %x of %s was taken out of the registry (%s): it gets no new requests",
                self.instance.instance_id,
                self.instance.name,
                reason,
            )

        self._record_is_ready = self._unhealthy is None
        self._registration = await self._registry.register(
            self.instance.name.instance_key(self.instance.instance_id),
            self.instance.to_bytes(ready=self._record_is_ready),
            stalled_value=self.instance.to_bytes(ready=False),
            on_lost=on_lost,
        )

    @property
    def not_ready(self) -> str | None:
        """The reason why callers do not choose this instance; None if they may."""
        if self._unhealthy is not None:
            return self._unhealthy
        if self._registration is None:
            return "it has left the registry"
        lost = self._registration.lost
        return None if lost is None else f"it was taken out of the registry ({lost})"

    def _note_canary(self, unhealthy: str | None) -> None:
        """Take the result of a canary request, and let the record tell of it."""
        if (unhealthy is None) != (self._unhealthy is None):
            if unhealthy is None:
                log.info("%s answers its canary requests again", self.instance.name)
            else:
                log.error("%s is not chosen by callers any more: %s", self.instance.name, unhealthy)
        self._unhealthy = unhealthy
        is_done = self._updating is None or self._updating.done()
        if is_done and self._record_is_ready != (unhealthy is None):
            self._updating = asyncio.create_task(self._update_record(), name=f"record of {self._subject}")

    async def _update_record(self) -> None:
        """Write the state of health into the record. Without Redis, the next result tries again."""
        registration, is_ready = self._registration, self._unhealthy is None
        if registration is None or registration.lost is not None:
            return
        with suppress(StoreError):
            await registration.update(
                self.instance.to_bytes(ready=is_ready), stalled_value=self.instance.to_bytes(ready=False)
            )
            self._record_is_ready = is_ready

    async def leave(self) -> None:
        """Take the record out of the registry; requests are still answered. Idempotent."""
        await withdraw(self.release_registrations())

    def release_registrations(self) -> list[Registration]:
        """Return this endpoint's registrations, which the caller has to withdraw; none at the next call."""
        registration, self._registration = self._registration, None
        return [] if registration is None else [registration]

    async def unregister(self) -> None:
        """Leave the registry, refuse new requests, and let requests under way finish. Idempotent.

        They have the rest of the time of the runtime's shutdown; without a shutdown, as long as one may take.
        """
        self.closed = True
        if self._canary is not None:
            self._canary.cancel()
        await self.leave()
        grace_s = self._shutdown.requests_left_s if self._graceful_shutdown else 0.0
        await self._server.unregister(self._subject, grace_s=grace_s)
        self._service.remove(self.instance)
