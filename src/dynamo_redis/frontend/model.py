"""A model as the frontend knows it: who serves it according to the registry, and what was loaded for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from dynamo_redis.decoding import removal
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.frontend.model_loading import LoadedModel
from dynamo_redis.names import EndpointName, InstanceId
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.model_card import ModelCard, parse_card_key
from dynamo_redis.store.base import Record


class EndpointClient(Protocol):
    """What serving needs of a `runtime.Client`."""

    def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
    ) -> Awaitable[AsyncIterator[Any]]: ...
    def confirmed_instances(self) -> list[Instance]: ...
    def instance_ids(self) -> list[int]: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """What loading depends on: cards that agree in this are served by the same loaded model.

    `files` are (name, sha256), ordered by name.
    """

    endpoint: EndpointName
    context_length: int
    model_type: str
    model_input: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CardEntry:
    """A card as it stands, and whose it is. `order` grows with each put."""

    card: ModelCard
    source: Source
    instance_id: InstanceId
    order: int

    @property
    def endpoint(self) -> EndpointName:
        """The endpoint that the instance serves the model at."""
        return self.source.endpoint

    @classmethod
    def from_record(cls, record: Record, order: int) -> Self:
        """Read a record below `MODEL_CARDS`. Raises InvalidRecord."""
        try:
            endpoint, instance_id = parse_card_key(record.key)
            card = ModelCard.from_bytes(record.value)
        except InvalidRecord as exc:
            raise exc.at(record.key, removal(record.key)) from None
        source = Source(
            endpoint,
            card.context_length,
            card.model_type,
            card.model_input,
            tuple(sorted((name, file.sha256) for name, file in card.files.items())),
        )
        return cls(card, source, instance_id, order)


@dataclass(slots=True)
class Model:
    """One model by the name that requests use: its cards, and, once loaded, what serves it."""

    name: str
    cards: dict[str, CardEntry] = field(default_factory=dict)
    """By their keys in the registry."""
    loaded: LoadedModel | None = None
    source: Source | None = None
    """Of what `loaded` was made."""
    client: EndpointClient | None = None
    among: frozenset[InstanceId] | None = None
    """The instances to choose from, or None if all of the endpoint's serve just this."""
    created_at: float = 0.0
    failure: str | None = None
    """Why it could not be loaded, the last time."""
    broken: set[Source] = field(default_factory=set)
    """Sources that cannot be loaded, of those that the cards name."""
    loading: asyncio.Task[None] | None = None
    loading_source: Source | None = None

    def instance_ids(self) -> frozenset[InstanceId]:
        """The instances whose cards say that they serve what is loaded."""
        return frozenset(entry.instance_id for entry in self.cards.values() if entry.source == self.source)

    def instances(self) -> list[Instance]:
        """Those of them that are known to be there."""
        if self.client is None:
            return []
        mine = self.instance_ids()
        return [instance for instance in self.client.confirmed_instances() if instance.instance_id in mine]
