"""The workers that a router chooses from: the ranks of an endpoint's instances, by their model cards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dynamo_redis.decoding import removal
from dynamo_redis.errors import InvalidRecord
from dynamo_redis.models.card import ModelCard, parse_card_key
from dynamo_redis.names import MODEL_CARDS, EndpointName
from dynamo_redis.router.base import BusyThresholds, Worker, WorkerLoad
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.load_metrics import LoadMetrics
from dynamo_redis.runtime.among import ids_now
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.dispatch import Dispatcher
from dynamo_redis.runtime.following import follow, key_of
from dynamo_redis.store.base import Delete, Put, Registry, WatchBatch
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

_WARNINGS_COUNT = 16


@dataclass(frozen=True, slots=True)
class Capacity:
    """The size of an instance's KV cache, by its model card."""

    block_size: int
    rank_count: int = 1
    total_blocks: int | None = None
    """The blocks of one rank."""
    event_plane: str | None = None
    step_tokens: int | None = None
    """Most prompt tokens that one rank reads in one step."""


class WorkerCards:
    """The capacities of an endpoint's instances, from their model cards.

    It owns one task, which reads a watch (bounded by the registry; overflow: a resync) until `aclose`. An
    instance is known until its card *and* its record are gone: a card may be missing for a moment after a
    lease has ended, and a record while an engine is down.
    """

    def __init__(
        self,
        registry: Registry,
        endpoint: EndpointName,
        on_block_size: Callable[[int], None] | None = None,
    ) -> None:
        """`on_block_size` is called with the first block size that a worker reports, and with another one as
        soon as all cards have it: then the engines were started anew with it."""
        self._registry = registry
        self._prefix = f"{MODEL_CARDS}{endpoint.path}/"
        self._capacities: dict[int, Capacity] = {}
        self._without_card: set[int] = set()
        self._reader: asyncio.Task[None] | None = None
        self._on_block_size = on_block_size
        self._has_block_size = asyncio.Event()
        self._expected: tuple[int, str | None] | None = None
        self._warned: set[str] = set()
        self._supervisor = Supervisor(log, f"cards below {self._prefix}")
        self.version = 0
        """A number that grows with each change."""

    def start(self) -> None:
        """Begin to watch."""
        if self._reader is None:
            reading = follow(self._registry, self._prefix, self.apply, self._supervisor)
            self._reader = asyncio.create_task(reading, name=f"cards {self._prefix}")

    async def aclose(self) -> None:
        """End the watch."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def get(self, instance_id: int) -> Capacity | None:
        """Return the capacity of an instance; None if it is not known."""
        return self._capacities.get(instance_id)

    async def wait_for_block_size(self, timeout_s: float) -> bool:
        """Wait until a worker has reported its block size; return whether one has."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_block_size.wait()
        return self._has_block_size.is_set()

    def note_block_size(self, instance_id: int, block_size: int) -> None:
        """Note the block size that an instance reports, by its card or with its answer from `kv_dump`."""
        if not self._has_block_size.is_set():
            self._has_block_size.set()
            if self._on_block_size is not None:
                self._on_block_size(block_size)
        self._check_block_size(instance_id, block_size)

    def expect(self, block_size: int, event_plane: str | None) -> None:
        """Warn, once for each reason, of instances whose blocks the router will never know: their blocks have
        another size, or they send their events by another event plane. `event_plane` is the one that the
        router follows; None if it follows none."""
        self._expected = (block_size, event_plane)
        for instance_id, capacity in self._capacities.items():
            self._check_block_size(instance_id, capacity.block_size)
            self._check_plane(instance_id, capacity.event_plane)

    def _check_block_size(self, instance_id: int, block_size: int) -> None:
        """Warn if an instance's blocks have another size than the router's."""
        if self._expected is not None and block_size != self._expected[0]:
            self._warn(
                instance_id,
                f"has KV blocks of {block_size} tokens, and this router looks for blocks of "
                f"{self._expected[0]}: none of its blocks will ever match. Set "
                f"DYN_KV_CACHE_BLOCK_SIZE={block_size}, or give all workers blocks of one size",
            )

    def _check_plane(self, instance_id: int, event_plane: str | None) -> None:
        """Warn if an instance sends its events by another event plane than the router follows."""
        followed = None if self._expected is None else self._expected[1]
        if followed is not None and event_plane not in (None, followed):
            self._warn(
                instance_id,
                f"sends its KV events by the event plane {event_plane!r}, and this router follows "
                f"{followed!r}: none of its blocks will be known. Set DYN_EVENT_PLANE alike",
            )

    def warn_of_no_size(self, instance_id: int) -> None:
        """Warn of an instance that says nowhere how many KV blocks it has."""
        self._warn(
            instance_id,
            "says neither in its card nor in its load reports how many KV blocks it has: "
            "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD does not count for it",
        )

    def _warn(self, instance_id: int, complaint: str) -> None:
        """Log a complaint about an instance, once, and no more than `_WARNINGS_COUNT` different ones."""
        if complaint not in self._warned and len(self._warned) < _WARNINGS_COUNT:
            self._warned.add(complaint)
            log.warning("instance %x below %s %s", instance_id, self._prefix, complaint)

    def forget_unlisted(self, listed_ids: Collection[int]) -> None:
        """Forget instances that have no card and are not among `listed_ids`."""
        for instance_id in self._without_card - set(listed_ids):
            self._without_card.discard(instance_id)
            del self._capacities[instance_id]
            self.version += 1

    def apply(self, batch: WatchBatch) -> None:
        """Apply changes. A card that cannot be read is skipped, and named in the log."""
        self._supervisor.each(batch.events, self._apply_event, key_of)

    def _apply_event(self, event: Put | Delete) -> None:
        """Apply one change. Raises InvalidRecord."""
        key = key_of(event)
        try:
            _, instance_id = parse_card_key(key)
            card = ModelCard.from_bytes(event.record.value) if isinstance(event, Put) else None
        except InvalidRecord as exc:
            raise exc.at(key, removal(key)) from None
        if card is None:
            if instance_id in self._capacities:
                self._without_card.add(instance_id)
            return
        capacity = Capacity(
            card.kv_cache_block_size,
            card.runtime_config.data_parallel_size or 1,
            card.runtime_config.total_kv_blocks,
            card.runtime_config.event_plane,
            card.runtime_config.max_num_batched_tokens,
        )
        self._without_card.discard(instance_id)
        if self._capacities.get(instance_id) != capacity:
            self._capacities[instance_id] = capacity
            self.version += 1
            size = capacity.block_size
            if self._on_block_size is not None and self._expected is not None and size != self._expected[0]:
                carded = (c for i, c in self._capacities.items() if i not in self._without_card)
                if all(known.block_size == size for known in carded):
                    self._on_block_size(size)
            self.note_block_size(instance_id, size)
            self._check_plane(instance_id, capacity.event_plane)


class Workers:
    """The workers to choose from: every rank of the instances that the client's view trusts most."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        cards: WorkerCards,
        metrics: LoadMetrics | None,
    ) -> None:
        """`metrics` are None if the workers' reports cannot be heard."""
        self._view = dispatcher.view
        self._cards = cards
        self._metrics = metrics
        self._usual: list[Worker] = []
        self._made_of: tuple[list[Member], int, frozenset[int] | None] | None = None

    def candidates(self, among: Collection[int] | None, excluded: Collection[int]) -> Sequence[Worker]:
        """Return the ranks of the view's candidates; of its last resorts if there are no candidates.

        Most requests bring the same ids as the one before, and the view makes a new list whenever its
        candidates change: so the ranks of the last candidates and ids are kept.
        """
        among = ids_now(among)
        if (among is None or isinstance(among, frozenset)) and not excluded:
            candidates, version, made_of = self._view.candidates, self._cards.version, self._made_of
            if (
                made_of is None
                or made_of[0] is not candidates
                or made_of[1] != version
                or made_of[2] is not among
            ):
                self._usual = self._ranks(
                    member for member in candidates if among is None or member.instance_id in among
                )
                self._made_of = (candidates, version, among)
            if self._usual:
                return self._usual
        for members in (self._view.candidates, *self._view.last_resorts()):
            workers = self._ranks(
                member
                for member in members
                if (among is None or member.instance_id in among) and member.instance_id not in excluded
            )
            if workers:
                return workers
        return []

    def without_busy(
        self, workers: Sequence[Worker], book: LoadBook, busy: BusyThresholds | None
    ) -> Sequence[Worker]:
        """Return the workers whose load is not above the thresholds; all of them where none is set."""
        if busy is None or not busy.is_set:
            return workers
        return [worker for worker in workers if not self._is_busy(worker, book.load(worker), busy)]

    def _is_busy(self, worker: Worker, load: WorkerLoad, busy: BusyThresholds) -> bool:
        """Return whether a worker's load is above a threshold.

        A threshold does not count for a worker that does not say the size which it is a part of.
        """
        most_tokens = busy.active_prefill_tokens_threshold
        if most_tokens is not None and load.prefill_tokens > most_tokens:
            return True
        capacity = self._cards.get(worker.instance_id)
        most_steps = busy.active_prefill_tokens_threshold_frac
        step_tokens = None if capacity is None else capacity.step_tokens
        if most_steps is not None and step_tokens and load.prefill_tokens > most_steps * step_tokens:
            return True
        most_used = busy.active_decode_blocks_threshold
        if most_used is None:
            return False
        total_blocks = None if capacity is None else capacity.total_blocks
        reported = None if self._metrics is None else self._metrics.used_blocks(worker)
        if reported is not None:
            total_blocks = reported[1] or total_blocks
        if total_blocks is None or total_blocks <= 0:
            if self._metrics is None or self._metrics.has_listened:
                self._cards.warn_of_no_size(worker.instance_id)
            return False
        return load.blocks / total_blocks > most_used

    def _ranks(self, members: Iterable[Member]) -> list[Worker]:
        """Return all ranks of these instances; one each where the card is not known."""
        workers = []
        for member in members:
            capacity = self._cards.get(member.instance_id)
            rank_count = 1 if capacity is None else capacity.rank_count
            workers += [Worker(member.instance_id, rank) for rank in range(rank_count)]
        return workers
