"""An endpoint while it is served: its place on the request plane and its record in the registry."""

from __future__ import annotations

import logging

from dynamo_redis.planes.base import RequestPlaneServer
from dynamo_redis.runtime.handlers import AnyHandler, adapt
from dynamo_redis.runtime.instance import Instance
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
    ) -> None:
        self.instance = instance
        self.closed = False
        self._server = server
        self._subject = instance.name.subject(instance.instance_id)
        self._graceful_shutdown = graceful_shutdown
        self._shutdown = shutdown
        self._registry = registry
        self._registration: Registration | None = None

    async def start(self, handler: AnyHandler) -> None:
        """Open the endpoint, then make it known. Raises StoreError; nothing stays half-registered."""
        self._server.register(self._subject, adapt(handler))
        try:
            await self.announce()
        except BaseException:
            await self._server.unregister(self._subject, grace_s=0)
            raise

    async def announce(self) -> None:
        """Put the record into the registry; no effect if it is there. Raises StoreError."""
        if self._registration is not None and self._registration.lost is None:
            return
        self._registration = await self._registry.register(
            self.instance.name.instance_key(self.instance.instance_id),
            self.instance.to_bytes(),
            stalled_value=self.instance.to_bytes(ready=False),
            on_lost=self._on_lost,
        )

    async def leave(self) -> None:
        """Take the record out of the registry; requests are still answered. Idempotent."""
        await withdraw(self.take_registrations())

    def take_registrations(self) -> list[Registration]:
        """What this endpoint keeps in the registry, for its caller to withdraw."""
        registration, self._registration = self._registration, None
        return [] if registration is None else [registration]

    async def unregister(self) -> None:
        """Leave the registry, refuse new requests, let those under way finish: within the time that is left
        of the runtime's shutdown, or that one may take. Idempotent."""
        self.closed = True
        await self.leave()
        grace_s = self._shutdown.requests_left_s if self._graceful_shutdown else 0.0
        await self._server.unregister(self._subject, grace_s=grace_s)

    def _on_lost(self, reason: LostReason) -> None:
        log.warning(
            "instance %x of %s was taken out of the registry (%s): it gets no new requests",
            self.instance.instance_id,
            self.instance.name,
            reason,
        )
