"""An endpoint while it is served: on the request plane, and with a record in the registry."""

from __future__ import annotations

import logging

from dynamo_redis.planes.base import RequestPlaneServer
from dynamo_redis.runtime.handlers import AnyHandler, adapt
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.service import Service, StatsHandler
from dynamo_redis.runtime.shutdown import ShutdownDeadline
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
    ) -> None:
        self.instance = instance
        self.closed = False
        self._server = server
        self._subject = instance.name.subject(instance.instance_id)
        self._graceful_shutdown = graceful_shutdown
        self._shutdown = shutdown
        self._service = service
        self._registry = registry
        self._registration: Registration | None = None

    async def start(
        self,
        handler: AnyHandler,
        stats_handler: StatsHandler | None = None,
        *,
        is_bidirectional: bool = False,
    ) -> None:
        """Open the endpoint for requests, then register it. If that raises StoreError, it is closed again."""
        self._server.register(self._subject, adapt(handler), request_stream=is_bidirectional)
        self._service.add(self.instance, stats_handler)
        try:
            await self.announce()
        except BaseException:
            self._service.remove(self.instance)
            await self._server.unregister(self._subject, grace_s=0)
            raise

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

        self._registration = await self._registry.register(
            self.instance.name.instance_key(self.instance.instance_id),
            self.instance.to_bytes(),
            stalled_value=self.instance.to_bytes(ready=False),
            on_lost=on_lost,
        )

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
        await self.leave()
        grace_s = self._shutdown.requests_left_s if self._graceful_shutdown else 0.0
        await self._server.unregister(self._subject, grace_s=grace_s)
        self._service.remove(self.instance)
