"""A frontend's record in the registry: `v1/frontends/<instance id>`, under its lease."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.decoding import VersionedModel, removal
from dynamo_redis.errors import InvalidRecord, StoreError, StoreRefused
from dynamo_redis.names import FRONTENDS, InstanceId, frontend_key
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import Record, Registration, Registry

if TYPE_CHECKING:  # commands that import this module must start quickly
    from dynamo_redis.config import FrontendSettings
    from dynamo_redis.runtime.runtime import DistributedRuntime

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 1.0


class FrontendRecord(VersionedModel):
    """One frontend: the URL of its HTTP server, and its router mode.

    Fields of later releases are ignored. `router_endpoint` is the router service that it uses, or None.
    `started_at` is in seconds since 1970.
    """

    WHAT: ClassVar[str] = "a frontend's record"
    VERSION: ClassVar[int] = 1

    instance_id: Annotated[int, Field(ge=0, lt=1 << 63)]
    http_url: str
    router_mode: str
    router_endpoint: str | None = None
    started_at: float = 0.0

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Read a record of the registry.

        Raises InvalidRecord, also if the id differs from that in the key.
        """
        try:
            frontend = cls.from_bytes(record.value)
        except InvalidRecord as exc:
            raise exc.at(record.key, removal(record.key)) from None
        if frontend_key(InstanceId(frontend.instance_id)) != record.key:
            reason = "its instance_id is not that of its key"
            raise InvalidRecord(cls.WHAT, reason, key=record.key, remedy=removal(record.key))
        return frontend


async def list_frontends(registry: Registry) -> tuple[list[FrontendRecord], list[InvalidRecord]]:
    """Return all frontends, by id, and the errors of unreadable records. Raises StoreError."""
    found = await registry.get_prefix(FRONTENDS)
    frontends, invalid = [], list(found.invalid)
    for record in found.records:
        try:
            frontends.append(FrontendRecord.from_record(record))
        except InvalidRecord as exc:
            invalid.append(exc)
    return frontends, invalid


async def keep_listed(
    runtime: DistributedRuntime, settings: FrontendSettings, listener: socket.socket
) -> None:
    """Register a frontend, with retries until Redis answers, and withdraw it at the shutdown.

    Only commands read the record: a frontend whose Redis user may not write serves all the same.
    """
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - all addresses: other machines use this machine's name
        host = socket.gethostname()
    record = FrontendRecord(
        instance_id=runtime.instance_id,
        http_url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        router_mode=settings.router_mode,
        router_endpoint=settings.router_endpoint,
        started_at=SYSTEM_CLOCK.wall(),
    )
    registration: Registration | None = None
    while registration is None:
        try:
            key = frontend_key(runtime.instance_id)
            registration = await runtime.registry.register(key, record.to_bytes())
        except StoreRefused as exc:
            log.info("this frontend is not listed in the registry: %s", exc)
            return
        except StoreError as exc:
            log.debug("not listed yet: %s", exc)
            await asyncio.sleep(RETRY_PAUSE_S)
    await runtime.wait_for_shutdown()
    await withdraw((registration,))
