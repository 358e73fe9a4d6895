"""A router's record in the registry: `v1/kv_routers/<namespace>/<component>/<router id>`, under its lease."""

from __future__ import annotations

import logging
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import SchemaMismatch
from dynamo_redis.names import KV_ROUTERS, kv_router_key
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.store.base import Registration, Registry

log = logging.getLogger(__name__)

RECORD_VERSION = 1


class RouterRecord(BaseModel):
    """One router of one component. Fields of later releases are kept and ignored.

    `consumer_group` is its group in the component's KV event stream; None if it follows none. `settings` are
    the router's, by the names of `RouterSettings`. `started_at` in seconds since 1970.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    version: int = RECORD_VERSION
    namespace: str
    component: str
    router_id: str
    instance_id: int
    consumer_group: str | None = None
    settings: dict[str, Any] = {}
    started_at: float = 0.0

    @property
    def key(self) -> str:
        """Where it stands in the registry."""
        return kv_router_key(self.namespace, self.component, self.router_id)

    def to_bytes(self) -> bytes:
        """The stored form, JSON."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> Self:
        """Read a stored record. Raises ValueError, SchemaMismatch for an unknown major version."""
        try:
            record = cls.model_validate_json(stored)
        except ValidationError as exc:
            raise ValueError(f"not a router's record: {exc.errors(include_url=False)[0]['msg']}") from exc
        if record.version != RECORD_VERSION:
            raise SchemaMismatch(str(record.version), str(RECORD_VERSION))
        return record


async def register_router(
    runtime: DistributedRuntime, namespace: str, component: str, router_id: str, settings: RouterSettings
) -> Registration:
    """Put a router into the registry for as long as it lives. Raises StoreError."""
    follows_stream = settings.use_kv_events and runtime.settings.events.event_plane == "stream"
    record = RouterRecord(
        namespace=namespace,
        component=component,
        router_id=router_id,
        instance_id=runtime.instance_id,
        consumer_group=router_id if follows_stream else None,
        settings=settings.model_dump(mode="json"),
        started_at=SYSTEM_CLOCK.wall(),
    )
    return await runtime.registry.register(record.key, record.to_bytes())


async def list_routers(registry: Registry) -> list[RouterRecord]:
    """All routers of the deployment, by key. Records that cannot be read are left out, with a warning."""
    records = []
    for stored in (await registry.get_prefix(KV_ROUTERS)).records:
        try:
            records.append(RouterRecord.from_bytes(stored.value))
        except (ValueError, SchemaMismatch) as exc:
            log.warning("left out of the routers: %s: %s", stored.key, exc)
    return records
