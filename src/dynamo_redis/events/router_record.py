"""A router's record in the registry: `v1/kv_routers/<namespace>/<component>/<router id>`, under its lease."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.config import RouterSettings
from dynamo_redis.decoding import VersionedModel, removal
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.names import KV_ROUTERS, kv_router_key
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.store.base import Record, Registration, Registry

RECORD_VERSION = 1


class RouterRecord(VersionedModel):
    """One router of one component. Fields of later releases are kept and ignored.

    `consumer_group` is its group in the component's KV event stream; None if it reads no stream. `settings`
    are the router's, by the names of `RouterSettings`. `started_at` is in seconds since 1970.
    """

    WHAT: ClassVar[str] = "a router's record"
    VERSION: ClassVar[int] = RECORD_VERSION

    namespace: str
    component: str
    router_id: str
    instance_id: Annotated[int, Field(ge=0, lt=1 << 63)]
    consumer_group: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    started_at: float = 0.0

    @property
    def key(self) -> str:
        """Its key in the registry."""
        return kv_router_key(self.namespace, self.component, self.router_id)

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Read a record of the registry. Raises InvalidRecord, also if the names in it are not those of its
        key."""
        remedy = removal(record.key)
        try:
            router = cls.from_bytes(record.value)
        except InvalidRecord as exc:
            raise exc.at(record.key, remedy) from None
        if router.key != record.key:
            reason = f"it is the record of {router.key}"
            raise InvalidRecord(cls.WHAT, reason, key=record.key, remedy=remedy)
        return router


async def register_router(
    runtime: DistributedRuntime, namespace: str, component: str, router_id: str, settings: RouterSettings
) -> Registration:
    """Register a router under the process's lease. Raises StoreError."""
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


async def list_routers(registry: Registry) -> tuple[list[RouterRecord], list[InvalidRecord]]:
    """Return all routers of the deployment, by key, and the records that cannot be read. Raises
    StoreError."""
    found = await registry.get_prefix(KV_ROUTERS)
    records, invalid = [], list(found.invalid)
    for stored in found.records:
        try:
            records.append(RouterRecord.from_record(stored))
        except InvalidRecord as exc:
            invalid.append(exc)
    return records, invalid
