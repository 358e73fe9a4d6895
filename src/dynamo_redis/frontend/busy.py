"""The busy thresholds of the models: those of the settings, and those that `POST /busy_threshold` has set.

The latter are in the registry, one record for each model, so they count at every frontend of the deployment,
and at frontends that start later. Removing the record brings back the thresholds of the settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field

from dynamo_redis.config import RouterSettings
from dynamo_redis.decoding import VersionedModel, removal
from dynamo_redis.errors import InvalidRecord, RevisionMismatch
from dynamo_redis.names import BUSY_THRESHOLDS, busy_threshold_key
from dynamo_redis.router.base import BusyThresholds
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.store.base import Delete, Put, Registry, WatchBatch
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

NAMES: Final = tuple(field.name for field in fields(BusyThresholds))


class ThresholdRecord(VersionedModel):
    """The thresholds that were set for a model. None: that of the frontend's settings."""

    WHAT: ClassVar[str] = "the busy thresholds of a model"
    VERSION: ClassVar[int] = 1

    model: str
    active_decode_blocks_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    active_prefill_tokens_threshold: Annotated[int, Field(ge=0)] | None = None
    active_prefill_tokens_threshold_frac: Annotated[float, Field(ge=0)] | None = None


class ModelThresholds:
    """The thresholds of each model. One `BusyThresholds` stays the same object, so requests that wait see
    changes. Their number is bounded by that of the models that were served, and of the records."""

    def __init__(
        self,
        registry: Registry,
        settings: RouterSettings | None = None,
        *,
        on_change: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_change` is called with the name of a model whose thresholds have changed."""
        self._registry = registry
        self._defaults = {name: getattr(settings, name) for name in NAMES} if settings else {}
        self._on_change = on_change
        self._models: dict[str, BusyThresholds] = {}
        self._names: dict[str, str] = {}  # key → model
        self._supervisor = Supervisor(log, "busy thresholds")

    async def follow(self) -> None:
        """Follow the records in the registry, until it is closed."""
        await follow(self._registry, BUSY_THRESHOLDS, self.apply, self._supervisor)

    def of(self, model: str) -> BusyThresholds:
        """Return the thresholds of a model that is served."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = BusyThresholds(**self._defaults)
        return found

    def describe(self, model: str) -> dict[str, Any]:
        """Return a model's thresholds as `/busy_threshold` shows them."""
        return {"model": model, **asdict(self.of(model))}

    async def change(self, model: str, changes: dict[str, float]) -> None:
        """Set some thresholds of a model, at all frontends: here at once, elsewhere as soon as they hear of
        it. Raises StoreError."""
        key = busy_threshold_key(model)
        while True:
            found = await self._registry.get(key)
            record = ThresholdRecord(model=model)
            if found is not None:
                try:
                    record = ThresholdRecord.from_bytes(found.value)
                except InvalidRecord as exc:
                    self._supervisor.skip(key, exc.at(key, removal(key)))
            record = record.model_copy(update={"model": model, **changes})
            expected = None if found is None else found.mod_revision
            try:
                await self._registry.compare_and_put(key, record.to_bytes(), expected)
            except RevisionMismatch:
                continue  # another frontend has changed it meanwhile
            break
        self._take(key, record)

    def apply(self, batch: WatchBatch) -> None:
        """Apply changes of the registry."""

        def take(event: Put | Delete) -> None:
            if isinstance(event, Put):
                key = event.record.key
                try:
                    record = ThresholdRecord.from_bytes(event.record.value)
                except InvalidRecord as exc:
                    raise exc.at(key, removal(key)) from None
                self._take(key, record)
            elif (model := self._names.pop(event.key, None)) is not None:
                self._set(model, {})

        self._supervisor.each(batch.events, take, key_of)

    def _take(self, key: str, record: ThresholdRecord) -> None:
        """Apply a record."""
        if busy_threshold_key(record.model) != key:
            reason = f"it is the record of {record.model!r}"
            raise InvalidRecord(record.WHAT, reason, key=key, remedy=removal(key))
        self._names[key] = record.model
        self._set(record.model, record.model_dump(include=set(NAMES), exclude_none=True))

    def _set(self, model: str, given: dict[str, Any]) -> None:
        thresholds, before = self.of(model), self.describe(model)
        for name, value in {**dict.fromkeys(NAMES), **self._defaults, **given}.items():
            setattr(thresholds, name, value)
        if self.describe(model) != before:
            values = asdict(thresholds).items()
            shown = ", ".join(f"{name} {value}" for name, value in values if value is not None)
            log.info("busy thresholds of model %r: %s", model, shown or "none")
            self._on_change(model)
