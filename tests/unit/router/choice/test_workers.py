"""The workers to choose from, and the busy ones: by bookings, and by the workers' reports."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_redis.events.block_hashes import pack_names
from dynamo_redis.models.card import ModelCard, RuntimeConfig
from dynamo_redis.names import EndpointName
from dynamo_redis.router.base import BusyThresholds, Worker
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.load_metrics import STALE_AFTER_S, LoadMetrics
from dynamo_redis.router.choice.workers import WorkerCards, Workers
from dynamo_redis.store.base import Delete, DeleteCause, LeaseId, Put, Record, Revision, WatchBatch
from dynamo_redis.store.registry.memory import MemoryRegistry, MemoryServer
from dynamo_redis.store.streams.memory import MemoryEventStreams
from dynamo_redis.wire.event import EventBatch, PublisherId

ENDPOINT = EndpointName("dynamo", "backend", "generate")
WORKER = Worker(1)


class HeldClock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class Scene:
    """Workers as a view and model cards show them."""

    def __init__(self, *, on_block_size: Callable[[int], None] | None = None, **thresholds: Any) -> None:
        self.view = SimpleNamespace(
            candidates=self.members(1, 2), last_resorts=lambda: [self.members(8), self.members(9)]
        )
        self.cards = WorkerCards(MemoryRegistry(MemoryServer()), ENDPOINT, on_block_size)
        self.clock = HeldClock()
        self.changes = 0
        self.book = LoadBook()
        self.metrics = LoadMetrics(
            MemoryEventStreams(), "dynamo", "backend", self.book, on_change=self.on_change, clock=self.clock
        )
        dispatcher: Any = SimpleNamespace(view=self.view)
        self.workers = Workers(dispatcher, self.cards, self.metrics)
        self.busy = BusyThresholds(**thresholds)

    @staticmethod
    def members(*ids: int) -> list[Any]:
        return [SimpleNamespace(instance_id=instance_id) for instance_id in ids]

    def on_change(self) -> None:
        self.changes += 1

    def card(
        self, instance_id: int, *, value: bytes | None = None, block_size: int = 16, **runtime_config: Any
    ) -> None:
        card = ModelCard(
            display_name="demo",
            slug="demo",
            context_length=100,
            kv_cache_block_size=block_size,
            runtime_config=RuntimeConfig(**runtime_config),
        )
        key = ENDPOINT.model_card_key(instance_id)
        revision = Revision("1-0")
        put = Put(Record(key, value or card.to_bytes(), revision, revision, 1, LeaseId(1)))
        self.cards.apply(WatchBatch((put,), revision))

    def lose_card(self, instance_id: int) -> None:
        key = ENDPOINT.model_card_key(instance_id)
        revision = Revision("2-0")
        self.cards.apply(WatchBatch((Delete(key, revision, DeleteCause.EXPIRED),), revision))

    def says(self, event: Any, *, dp_rank: int = 0) -> None:
        batch = EventBatch("kv_metrics", PublisherId(1, 1, dp_rank), 0, 0, [event])
        self.metrics.apply(batch.to_bytes())

    def is_busy(self) -> bool:
        return not self.workers.without_busy([WORKER], self.book, self.busy)


def test_every_rank_may_be_chosen_as_soon_as_its_card_is_known() -> None:
    scene = Scene()
    assert scene.workers.candidates(None, ()) == [Worker(1), Worker(2)]
    scene.card(1, data_parallel_size=2)
    scene.card(2, value=b"no card")
    assert scene.workers.candidates(None, ()) == [Worker(1, 0), Worker(1, 1), Worker(2)]
    scene.view.candidates = scene.members(1)
    assert scene.workers.candidates(None, ()) == [Worker(1, 0), Worker(1, 1)]


def test_instance_is_known_while_card_or_record_is_left() -> None:
    scene = Scene()
    scene.card(1, data_parallel_size=2)
    scene.cards.forget_unlisted([])  # its engine is down, say: the record is away, the card is not
    assert scene.cards.get(1) is not None
    scene.lose_card(1)
    scene.lose_card(2)
    scene.cards.forget_unlisted([1, 2])  # its lease is lost, but it answers
    assert scene.workers.candidates({1}, ()) == [Worker(1, 0), Worker(1, 1)]
    scene.card(1, data_parallel_size=2)
    scene.cards.forget_unlisted([])
    assert scene.cards.get(1) is not None
    scene.lose_card(1)
    scene.cards.forget_unlisted([])
    assert scene.cards.get(1) is None
    assert scene.workers.candidates(None, ()) == [Worker(1), Worker(2)]


def test_the_less_trusted_are_a_last_resort() -> None:
    scene = Scene()
    assert scene.workers.candidates({2, 8}, ()) == [Worker(2)]
    assert scene.workers.candidates(None, {1, 2}) == [Worker(8)]
    assert scene.workers.candidates({9}, ()) == [Worker(9)]
    scene.view.candidates = []
    assert scene.workers.candidates(None, ()) == [Worker(8)]
    assert scene.workers.candidates(None, {8, 9}) == []


def test_no_worker_is_busy_without_a_threshold() -> None:
    scene = Scene()
    scene.book.add("me", "r", WORKER, prefill_tokens=10**9, blocks=10**9, deadline=1e12)
    assert not scene.is_busy()


def test_a_worker_with_too_much_to_read_is_busy() -> None:
    scene = Scene(active_prefill_tokens_threshold=100)
    scene.book.add("me", "r", WORKER, prefill_tokens=100, blocks=7, deadline=1e12)
    assert not scene.is_busy()
    scene.book.add("me", "s", WORKER, prefill_tokens=1, blocks=1, deadline=1e12)
    assert scene.is_busy()
    scene.book.prefill_done("me", "r")
    assert not scene.is_busy()


def test_tokens_to_read_are_measured_by_a_step() -> None:
    scene = Scene(active_prefill_tokens_threshold_frac=1.5)
    scene.book.add("me", "r", WORKER, prefill_tokens=151, blocks=10, deadline=1e12)
    assert not scene.is_busy()  # the size of a step is not known
    scene.card(1, max_num_batched_tokens=100)
    assert scene.is_busy()
    scene.card(1, max_num_batched_tokens=101)
    assert not scene.is_busy()


def test_thresholds_count_as_soon_as_they_change() -> None:
    scene = Scene()
    scene.book.add("me", "r", WORKER, prefill_tokens=1, blocks=1, deadline=1e12)
    assert not scene.is_busy()
    scene.busy.active_prefill_tokens_threshold = 0
    assert scene.is_busy()
    scene.busy.active_prefill_tokens_threshold = None
    assert not scene.is_busy()


async def test_worker_without_a_size_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(active_decode_blocks_threshold=0.5)
    scene.metrics.start()
    scene.card(1)
    assert not scene.is_busy()
    assert not caplog.messages  # it may still report its load
    scene.clock.now += STALE_AFTER_S + 1
    for _ in range(3):
        assert not scene.is_busy()
    assert [message for message in caplog.messages if "how many KV blocks it has" in message] != []
    assert len(caplog.messages) == 1
    await scene.metrics.aclose()


@pytest.mark.parametrize("booked", [True, False])
def test_worker_load_is_by_bookings_or_its_report(booked: bool) -> None:
    scene = Scene(active_decode_blocks_threshold=0.5)
    scene.card(1, total_kv_blocks=10)
    if booked:
        scene.book.add("me", "r", WORKER, prefill_tokens=0, blocks=6, deadline=1e12)
    else:
        scene.says({"kv_stats": {"kv_active_blocks": 6}})
        assert scene.changes == 1
    assert scene.is_busy()


def test_report_is_replaced_and_expires() -> None:
    scene = Scene(active_decode_blocks_threshold=0.5)
    scene.says({"kv_stats": {"kv_active_blocks": 60, "kv_total_blocks": 100}})
    assert scene.is_busy()
    scene.says({"kv_stats": {"kv_active_blocks": 90, "kv_total_blocks": 100}}, dp_rank=1)  # another worker
    scene.says({"kv_stats": {"kv_active_blocks": 50, "kv_total_blocks": 100}})
    assert not scene.is_busy()
    scene.says({"kv_stats": {"kv_active_blocks": 60, "kv_total_blocks": 100}})
    scene.clock.now += STALE_AFTER_S + 1
    scene.metrics.expire()
    assert not scene.is_busy()
    assert scene.metrics._used == {}


def test_a_worker_that_shares_blocks_is_not_full() -> None:
    """Twelve chats of one system prompt of 350 blocks, on a worker of 1,000."""
    scene = Scene(active_decode_blocks_threshold=0.5)
    scene.card(1, total_kv_blocks=1000)
    for number in range(12):
        names = pack_names([*range(350), 1000 + number])
        scene.book.add("me", str(number), WORKER, prefill_tokens=16, blocks=352, deadline=1e12, names=names)
    assert scene.book.load(WORKER).blocks == 350 + 12 * 2
    assert not scene.is_busy()
    scene.says({"kv_stats": {"kv_active_blocks": 367, "kv_total_blocks": 1000}})
    assert not scene.is_busy()
    scene.says({"kv_stats": {"kv_active_blocks": 501, "kv_total_blocks": 1000}})
    assert scene.is_busy()


@pytest.mark.parametrize(
    "event",
    [None, [], {}, {"kv_stats": None}, {"kv_stats": {}}, {"kv_stats": {"kv_active_blocks": "9"}}],
)
def test_report_without_blocks_changes_nothing(event: Any) -> None:
    scene = Scene(active_decode_blocks_threshold=0.5)
    scene.says({"kv_stats": {"kv_active_blocks": 60, "kv_total_blocks": 100}})
    scene.says(event)
    scene.metrics.apply(b"\xc1")
    scene.metrics.apply(b"")
    assert scene.is_busy()


def test_blocks_of_another_size_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.card(1)
    scene.cards.expect(16, "stream")
    assert caplog.messages == []
    scene = Scene()
    scene.card(1)
    scene.cards.expect(64, None)
    scene.card(2)
    [warning] = caplog.messages
    assert "blocks of 16 tokens" in warning
    assert "DYN_KV_CACHE_BLOCK_SIZE=16" in warning


def test_events_that_travel_otherwise_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for followed in ("stream", None):
        scene = Scene()
        scene.card(1, event_plane="stream")
        scene.cards.expect(16, followed)
    assert caplog.messages == []
    scene = Scene()
    scene.cards.expect(16, "stream")
    scene.card(1, event_plane="pubsub")
    scene.card(2, event_plane="pubsub")
    [warning] = caplog.messages
    assert "'pubsub'" in warning
    assert "Set DYN_EVENT_PLANE alike" in warning


def test_block_size_follows_when_all_cards_name_another() -> None:
    told: list[int] = []

    def use(block_size: int) -> None:
        told.append(block_size)
        scene.cards.expect(block_size, None)

    scene = Scene(on_block_size=use)
    scene.card(1)
    scene.card(2)
    scene.card(1, block_size=32)  # its engine was started anew; the other one's was not yet
    assert told == [16]
    scene.card(2, block_size=32)
    assert told == [16, 32]
    scene.lose_card(1)
    scene.card(2, block_size=64)  # what counts are the cards that stand
    assert told == [16, 32, 64]
