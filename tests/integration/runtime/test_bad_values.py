"""Every long-lived task that reads stored values goes on after invalid ones.

Each task has to see the next good value while the bad ones are there, and after they are gone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import msgpack
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dynamo_redis.config import EventSettings, RouterSettings
from dynamo_redis.frontend.http.errors import ApiError
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.models.card import MAX_RANKS, ModelCard
from dynamo_redis.names import MODEL_CARDS, EndpointName, InstanceId, kv_routers_prefix
from dynamo_redis.router.base import Worker
from dynamo_redis.router.choice.booking_sync import BookingSync
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.load_metrics import LoadMetrics
from dynamo_redis.router.choice.workers import WorkerCards
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.runtime import DistributedRuntime
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.store.event_base import NewEntry, StreamName
from dynamo_redis.wire.event import PublisherId
from dynamo_redis.wire.kv_event import stored
from dynamo_redis.wire.topics import ACTIVE_SEQUENCES, KV_EVENTS, KV_METRICS
from tests.integration.conftest import OpenRuntime
from tests.rubbish import WORST_JSON, WORST_MSGPACK, WORST_VALUES, arrays_like, records_like, with_field

ENDPOINT = EndpointName("dynamo", "backend", "generate")
PATIENCE_S = 30.0
AGAIN_S = 0.5
BAD_IDS = 0x10000
NUMBERS = itertools.count(10)

GOOD_INSTANCE: dict[str, Any] = json.loads(
    Instance(ENDPOINT, InstanceId(1), {"tcp": "127.0.0.1:1/x"}).to_bytes()
)
GOOD_CARD: dict[str, Any] = json.loads(
    ModelCard(display_name="bad", slug="bad", context_length=100, kv_cache_block_size=16).to_bytes()
)
GOOD_BATCH: list[Any] = [1, "topic", 9, 6, 0, 0, 1_700_000_000_000, [[0, 0, b"\0" * 8]]]


class Fed(Protocol):
    """A task under test."""

    async def spoil(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        """Write bad values where the task reads."""

    async def heal(self) -> None:
        """Remove the values of `spoil` that are still there."""

    async def write(self, number: int) -> None:
        """Write a good value."""

    def sees(self, number: int) -> bool:
        """Return whether the task has read that good value."""

    def ghosts(self) -> Sequence[object]:
        """Return the state that the task has made of bad values."""


async def shows(fed: Fed) -> None:
    """Wait until the task sees a new good value.

    The value is written repeatedly, since a reader that starts again may start after it.
    """
    number = next(NUMBERS)
    async with asyncio.timeout(PATIENCE_S):
        while not fed.sees(number):
            await fed.write(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S):
                    while not fed.sees(number):
                        await asyncio.sleep(0.01)


class _OfKeys:
    """A task that watches keys of the registry."""

    prefix: str
    good: dict[str, Any]

    def __init__(self, runtime: DistributedRuntime) -> None:
        self.runtime = runtime
        self._spoilt: list[str] = []

    async def spoil(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        values = [*WORST_JSON.values(), *draw(st.lists(records_like(self.good), min_size=10, max_size=10))]
        values += [
            with_field(self.good, field, text) for field in self.good for text in WORST_VALUES.values()
        ]
        names = [f"{number:x}" for number in range(BAD_IDS, BAD_IDS + len(values))]
        names += ["zz", "-5", "f" * 40, "%zz", "a/b/c", " 5"]
        for name, value in zip(names, itertools.cycle(values), strict=False):
            self._spoilt.append(self.prefix + name)
            await self.runtime.registry.put(self._spoilt[-1], value)

    async def heal(self) -> None:
        for key in self._spoilt:
            await self.runtime.registry.delete(key)
        self._spoilt.clear()


class View(_OfKeys):
    """The view of an endpoint."""

    prefix = ENDPOINT.instances_prefix
    good = GOOD_INSTANCE

    def __init__(self, runtime: DistributedRuntime, client: Client) -> None:
        super().__init__(runtime)
        self._client = client

    @classmethod
    @asynccontextmanager
    async def open(cls, runtime: DistributedRuntime, _: Path) -> AsyncIterator[Fed]:
        async with await runtime.endpoint(str(ENDPOINT)).client() as client:
            yield cls(runtime, client)

    async def write(self, number: int) -> None:
        instance = Instance(ENDPOINT, InstanceId(number), {"tcp": "127.0.0.1:1/x"})
        await self.runtime.registry.put(ENDPOINT.instance_key(number), instance.to_bytes())

    def sees(self, number: int) -> bool:
        return number in self._client.known_ids()

    def ghosts(self) -> Sequence[object]:
        return [number for number in self._client.known_ids() if number >= BAD_IDS]


class Models(_OfKeys):
    """The set of served models."""

    prefix = f"{MODEL_CARDS}{ENDPOINT.path}/"
    good = GOOD_CARD

    def __init__(self, runtime: DistributedRuntime, models: LiveModels) -> None:
        super().__init__(runtime)
        self._models = models

    @classmethod
    @asynccontextmanager
    async def open(cls, runtime: DistributedRuntime, directory: Path) -> AsyncIterator[Fed]:
        async def no_client(endpoint: EndpointName) -> Any:
            raise AssertionError("no model has files, so none is loaded")

        async with LiveModels(runtime, open_client=no_client, cache_dir=directory) as models:
            yield cls(runtime, models)

    async def write(self, number: int) -> None:
        card = ModelCard(display_name=f"good {number}", slug="g", context_length=9, kv_cache_block_size=16)
        await self.runtime.registry.put(ENDPOINT.model_card_key(number), card.to_bytes())

    def sees(self, number: int) -> bool:
        try:
            self._models.get(f"good {number}")
        except ApiError as exc:
            return exc.status == 503  # known, and without its files
        return True

    def ghosts(self) -> Sequence[object]:
        return self._models.served()


class Cards(_OfKeys):
    """The cards that a router reads."""

    prefix = f"{MODEL_CARDS}{ENDPOINT.path}/"
    good = GOOD_CARD

    def __init__(self, runtime: DistributedRuntime, cards: WorkerCards) -> None:
        super().__init__(runtime)
        self._cards = cards

    @classmethod
    @asynccontextmanager
    async def open(cls, runtime: DistributedRuntime, _: Path) -> AsyncIterator[Fed]:
        cards = WorkerCards(runtime.registry, ENDPOINT)
        cards.start()
        try:
            yield cls(runtime, cards)
        finally:
            await cards.aclose()

    async def write(self, number: int) -> None:
        card = ModelCard(display_name="good", slug="g", context_length=9, kv_cache_block_size=16)
        await self.runtime.registry.put(ENDPOINT.model_card_key(number), card.to_bytes())

    def sees(self, number: int) -> bool:
        return self._cards.get(number) is not None

    def ghosts(self) -> Sequence[object]:
        known = filter(None, map(self._cards.get, range(BAD_IDS, 2 * BAD_IDS)))
        return [card for card in known if card.block_size < 1 or card.rank_count > MAX_RANKS]


class _OfEvents:
    """A task that reads events. Bad events stay until they are trimmed, or are heard once."""

    topic: str
    good_event: tuple[Any, ...] = (0, 0, b"\0" * 8)

    def __init__(self, runtime: DistributedRuntime) -> None:
        self.runtime = runtime
        self.stream = StreamName(ENDPOINT.namespace, ENDPOINT.component, self.topic)

    async def send(self, contents: Sequence[bytes]) -> None:
        await self.runtime.events.append(self.stream, [NewEntry(content, 1) for content in contents])

    async def spoil(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        batches = draw(st.lists(arrays_like(GOOD_BATCH), min_size=10, max_size=10))
        bad_events: list[Any] = [None, [], {}, [["add"]], [0, 0, b"x"], 1 << 63]
        bad_events += draw(st.lists(arrays_like(list(self.good_event)), min_size=10, max_size=10))
        contents = [*WORST_MSGPACK.values(), *map(msgpack.packb, batches)]
        contents += [batch(self.topic, 9, [event]) for event in bad_events]
        await self.send(contents)

    async def heal(self) -> None:
        await self.runtime.events.delete(self.stream)

    def ghosts(self) -> Sequence[object]:
        return []


def batch(topic: str, instance_id: int, events: list[Any], sequence: int = 0) -> bytes:
    return msgpack.packb([1, topic, instance_id, 6, 0, sequence, 1_700_000_000_000, events])


class Events(_OfEvents):
    """The reader of KV events."""

    topic = KV_EVENTS

    def __init__(self, runtime: DistributedRuntime, indexer: Indexer) -> None:
        super().__init__(runtime)
        self._indexer = indexer

    @classmethod
    @asynccontextmanager
    async def open(cls, runtime: DistributedRuntime, _: Path) -> AsyncIterator[Fed]:
        indexer = Indexer(runtime, "dynamo", "backend", RouterSettings.load(), router_id="5-a")
        try:
            await indexer.start()
            yield cls(runtime, indexer)
        finally:
            await indexer.aclose()

    async def write(self, number: int) -> None:
        await self.send([batch(KV_EVENTS, number, [stored([number]).to_wire()])])

    def sees(self, number: int) -> bool:
        return self._indexer.index.block_counts().get(Worker(number), 0) == 1


class Bookings(_OfEvents):
    """The reader of other routers' requests under way, and the watch of their records."""

    topic = ACTIVE_SEQUENCES
    good_event = ("add", "r", 9, 0, 10, 2, 30.0)

    def __init__(self, runtime: DistributedRuntime, book: LoadBook) -> None:
        super().__init__(runtime)
        self._book = book

    @classmethod
    @asynccontextmanager
    async def open(cls, runtime: DistributedRuntime, _: Path) -> AsyncIterator[Fed]:
        book = LoadBook()
        sync = BookingSync(
            runtime.events,
            runtime.registry,
            "dynamo",
            "backend",
            PublisherId(5, 5, 0),
            EventSettings.load(),
            book,
            lambda: (),
        )
        try:
            await sync.start(PATIENCE_S)
            yield cls(runtime, book)
        finally:
            await sync.aclose()

    async def spoil(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        await super().spoil(draw)
        records = kv_routers_prefix("dynamo", "backend")
        for name, value in zip(("zz", "%zz", "a/b"), WORST_JSON.values(), strict=False):
            await self.runtime.registry.put(records + name, value)

    async def write(self, number: int) -> None:
        await self.send([batch(ACTIVE_SEQUENCES, number, [["add", "r", number, 0, 10, 2, 30.0]])])

    def sees(self, number: int) -> bool:
        return Worker(number) in self._book.loads()


class Loads(_OfEvents):
    """The listener to workers' load."""

    topic = KV_METRICS

    def __init__(self, runtime: DistributedRuntime, metrics: LoadMetrics) -> None:
        super().__init__(runtime)
        self._metrics = metrics

    @classmethod
    @asynccontextmanager
    async def open(cls, runtime: DistributedRuntime, _: Path) -> AsyncIterator[Fed]:
        metrics = LoadMetrics(runtime.events, "dynamo", "backend", LoadBook(), on_change=lambda: None)
        metrics.start()
        try:
            yield cls(runtime, metrics)
        finally:
            await metrics.aclose()

    async def send(self, contents: Sequence[bytes]) -> None:
        for content in contents:
            await self.runtime.events.publish(self.stream, content)

    async def write(self, number: int) -> None:
        await self.send([batch(KV_METRICS, number, [{"kv_stats": {"kv_active_blocks": 3}}])])

    def sees(self, number: int) -> bool:
        return self._metrics.used_blocks(Worker(number)) == (3, None)


TASKS: dict[str, Any] = {kind.__name__: kind for kind in (View, Models, Cards, Events, Bookings, Loads)}


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_task_goes_on_after_bad_values(
    task: str, data: st.DataObject, open_runtime: OpenRuntime, tmp_path: Path
) -> None:
    runtime = await open_runtime()
    async with TASKS[task].open(runtime, tmp_path) as fed:
        await shows(fed)
        await fed.spoil(data.draw)
        await shows(fed)
        await fed.heal()
        await shows(fed)
        assert not fed.ghosts()
