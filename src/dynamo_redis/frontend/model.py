"""A model in the frontend: its cards and instances in the registry, and its loaded files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from dynamo_redis.decoding import removal
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.models.card import ModelCard, parse_card_key
from dynamo_redis.models.llm_protocol import GenerateRequest
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.context import Context
from dynamo_redis.router.base import BusyThresholds
from dynamo_redis.runtime.among import LiveIds
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.base import Record


class Answer(Protocol):
    """The part of a `runtime.Call` that serving needs."""

    @property
    def instance_id(self) -> int: ...
    @property
    def resent_count(self) -> int: ...
    @property
    def is_over(self) -> bool: ...
    async def next_items(self) -> list[Any]: ...
    async def aclose(self) -> None: ...


class EndpointClient(Protocol):
    """The part of a `runtime.Client` that serving needs."""

    def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
        busy: BusyThresholds | None = None,
    ) -> Awaitable[Answer]:
        """Send a request to an instance, of `among` if given, that is not busy by these thresholds. Raises
        PlaneError; Overloaded if all are busy for too long."""
        ...

    async def count_load(self) -> None:
        """Begin to count the load of the instances, by which they are busy. Idempotent."""
        ...

    def confirmed_instances(self) -> list[Instance]: ...
    def instance_ids(self) -> list[int]: ...
    def members(self) -> list[Member]: ...
    async def aclose(self) -> None: ...


Generate = Callable[[GenerateRequest, Context, Collection[int]], Awaitable[Answer]]
"""Sends a request to a worker other than those of these ids; awaited, and then read. Raises PlaneError at
either step."""


@dataclass(frozen=True, slots=True)
class Source:
    """The parts of a card on which loading depends: one loaded model serves all cards with equal parts."""

    endpoint: EndpointName
    fingerprint: str
    """The fingerprint of the card."""


@dataclass(frozen=True, slots=True)
class CardEntry:
    """A card in the registry, and its instance. `order` grows with each put."""

    card: ModelCard
    source: Source
    instance_id: InstanceId
    order: int

    @property
    def endpoint(self) -> EndpointName:
        """The endpoint at which the instance serves the model."""
        return self.source.endpoint

    @classmethod
    def from_record(cls, record: Record, order: int) -> Self:
        """Read a record below `MODEL_CARDS`. Raises InvalidRecord."""
        try:
            endpoint, instance_id = parse_card_key(record.key)
            card = ModelCard.from_bytes(record.value)
        except InvalidRecord as exc:
            raise exc.at(record.key, removal(record.key)) from None
        source = Source(endpoint, card.fingerprint)
        return cls(card, source, instance_id, order)


@dataclass(slots=True, eq=False)
class Model:
    """One version of a model: the cards of one source, and the loaded model and client once it is loaded."""

    name: str
    source: Source
    loaded: LoadedModel | None = None
    client: EndpointClient | None = None
    among: LiveIds = field(default_factory=LiveIds)
    """The instances to choose from. Waiting requests keep a reference, so the object is never replaced."""
    failure: str | None = None
    """The reason why the last attempt to load it failed."""
    is_broken: bool = False
    """True if it can never be loaded."""
    loading: asyncio.Task[None] | None = None


@dataclass(slots=True)
class NamedModel:
    """All versions of a model under one name: its cards, and a `Model` for each version.

    There is one version, except while workers are replaced by ones with other files or another context.
    """

    name: str
    cards: dict[str, CardEntry] = field(default_factory=dict)
    """The cards, by their keys in the registry."""
    versions: dict[Source, Model] = field(default_factory=dict)
    created_at: float = 0.0
    logged_sources: frozenset[Source] = frozenset()
    """The versions that the log named last."""

    def by_source(self) -> dict[Source, list[CardEntry]]:
        """Return the cards of each version."""
        cards: dict[Source, list[CardEntry]] = {}
        for entry in self.cards.values():
            cards.setdefault(entry.source, []).append(entry)
        return cards

    def loaded(self) -> list[Model]:
        """Return the versions that can be served."""
        return [model for model in self.versions.values() if model.loaded is not None]

    @property
    def context_length(self) -> int:
        """The longest context of the versions that can be served."""
        return max(m.loaded.context_length for m in self.versions.values() if m.loaded is not None)

    def instance_ids(self, model: Model) -> frozenset[InstanceId]:
        """Return the instances with a card of this version.

        If no card of it is left, they are those of the other versions at its endpoint, which replace it.
        """
        of_endpoint = [entry for entry in self.cards.values() if entry.endpoint == model.source.endpoint]
        own = [entry for entry in of_endpoint if entry.source == model.source]
        return frozenset(entry.instance_id for entry in own or of_endpoint)

    def instances(self) -> list[Instance]:
        """Return the confirmed instances of all versions."""
        found = {}
        for model in self.loaded():
            assert model.client is not None
            ids = self.instance_ids(model)
            for instance in model.client.confirmed_instances():
                if instance.instance_id in ids:
                    found[instance.name, instance.instance_id] = instance
        return list(found.values())

    def reachable_count(self, model: Model) -> int:
        """Return the number of instances of this version that can be chosen now."""
        assert model.client is not None
        return len(self.instance_ids(model).intersection(model.client.instance_ids()))
