"""The router as frontends and `dynamo-redis router` use it: it knows, chooses, sends, and says how it is."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.events.router_record import register_router
from dynamo_redis.models.llm_protocol import is_count
from dynamo_redis.names import EndpointName
from dynamo_redis.planes.context import Context
from dynamo_redis.router.answering import serve_answers
from dynamo_redis.router.base import Choice, CostWeights, RoutingRequest, Worker
from dynamo_redis.router.choice.booking import Booking, BookingChooser
from dynamo_redis.router.choice.booking_sync import BookingSync, owner_name
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.load_metrics import LoadMetrics
from dynamo_redis.router.choice.selector import Selector
from dynamo_redis.router.choice.waiting_line import WaitingLines
from dynamo_redis.router.choice.workers import WorkerCards, Workers
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.router.index.predicted_index import PredictedIndex
from dynamo_redis.router.prompts import block_hashes, token_ids_of, weights_of
from dynamo_redis.router.routed_call import BookedRoute, RoutedCall
from dynamo_redis.router.router_state import Counts, RouterState, describe_workers
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.serving import ServedEndpoint
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import Registration
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import PublisherId

log = logging.getLogger(__name__)

BOOKING_S = 600.0
"""How long a request is booked that brings no deadline of its own: the frontend's own limit."""

_TICK_S = 1.0
_SYNC_START_S = 2.0
_MEET_S = 1.0
_BLOCK_SIZE_S = 2.0
_USUAL_BLOCK_SIZE = 16


class KvRouter:
    """Routes the requests of one endpoint to the workers that hold most of their prompts, and have time.

    Use it as `async with`, or call `start` and `aclose`. It stands for a `Client` of the endpoint. It follows
    the workers' KV events, or with `use_kv_events` off, or without an event plane, predicts from its own
    choices. While Redis is away it chooses by what it knows.

    It owns one task, `_tend`, beside those of its parts. All belong to the event loop that starts it.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        endpoint: EndpointName,
        settings: RouterSettings,
        *,
        block_size: int | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`block_size` counts where the settings name none. Without both that of the first worker does which
        names one, in its model card or with its KV events; until then blocks have 16 tokens."""
        self.endpoint = endpoint
        self._runtime = runtime
        self._settings = settings
        self._rng = rng or random.Random()  # noqa: S311 - spreading load, no secret
        self._publisher = PublisherId(runtime.instance_id, secrets.randbits(32), 0)
        self.router_id = owner_name(self._publisher)
        self._ids = itertools.count()
        self._weights = CostWeights(
            overlap_score_credit=settings.kv_overlap_score_weight,
            host_credit=settings.router_host_cache_hit_weight,
            disk_credit=settings.router_disk_cache_hit_weight,
            prefill_load_scale=settings.router_prefill_load_scale,
            temperature=settings.router_temperature,
        )
        self.counts = Counts()
        """What it has done since it was made."""
        self._lines = WaitingLines(settings.router_queue_count)
        given_block_size = settings.kv_cache_block_size or block_size
        self.block_size = given_block_size or _USUAL_BLOCK_SIZE
        """Tokens a block."""
        self._learns_block_size = given_block_size is None
        self._cards = WorkerCards(
            runtime.registry, endpoint, self._use_block_size if self._learns_block_size else None
        )
        self._client: Client
        self._book = LoadBook()
        self._workers: Workers
        self._predicted: PredictedIndex | None = None
        self._metrics: LoadMetrics | None = None
        self._sync: BookingSync | None = None
        self._record: Registration | None = None
        self._served: list[ServedEndpoint] = []
        self._tending: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(log, f"router of {endpoint}")
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self.chooser: BookingChooser
        """Valid after `start`."""
        self.indexer: Indexer | None = None
        """None if it predicts."""

    # ----------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Return when the router can choose, within seconds, whether or not there is a worker. Raises
        StoreError; nothing is left open then."""
        try:
            await self._open(self._closing.append)
        except BaseException:
            await self.aclose()
            raise

    async def _open(self, closes: Callable[[Callable[[], Awaitable[None]]], None]) -> None:
        self._client = await self._runtime.endpoint(str(self.endpoint)).client()
        closes(self._client.aclose)
        self._cards.start()
        closes(self._cards.aclose)
        self._make_index()
        self._make_chooser()
        if not self._learns_block_size:
            self._expect_cards()
        starting: list[Awaitable[None]] = []
        if self.indexer is not None:
            closes(self.indexer.aclose)
            starting.append(self.indexer.start())
        if self._sync is not None:
            closes(self._sync.aclose)
            starting.append(self._sync.start(_SYNC_START_S))
        if self._metrics is not None:
            closes(self._metrics.aclose)
            self._metrics.start()
        self._tending = asyncio.create_task(
            self._supervisor.run(self._tend), name=f"router of {self.endpoint}"
        )
        closes(self._stop_tending)
        await asyncio.gather(*starting)
        if self._learns_block_size:
            await self._wait_for_block_size()
        self._record = await register_router(
            self._runtime, self.endpoint.namespace, self.endpoint.component, self.router_id, self._settings
        )
        closes(self._leave)
        if self._sync is not None:
            await self._sync.meet(_MEET_S)
        await self._answer()

    async def _wait_for_block_size(self) -> None:
        """Wait for a moment until a worker has named it, if there are workers."""
        patience_s = _BLOCK_SIZE_S if self._client.known_ids() else 0.0
        if not await self._cards.wait_for_block_size(patience_s):
            log.info(
                "no worker of %s has said yet how many tokens its KV blocks have: until one does they are "
                "taken to have %d",
                self.endpoint,
                self.block_size,
            )

    def _use_block_size(self, block_size: int) -> None:
        if block_size != self.block_size:
            log.info("KV blocks of %s have %d tokens", self.endpoint, block_size)
        self.block_size = block_size
        self.chooser.use_block_size(block_size)
        self._expect_cards()

    def _expect_cards(self) -> None:
        followed = None if self.indexer is None else self._runtime.settings.events.event_plane
        self._cards.expect(self.block_size, followed)

    async def _answer(self) -> None:
        """Let `dynamo-redis router-state` and `best-worker` ask this router."""
        try:
            self._served = await serve_answers(self._runtime, self)
        except (ConfigError, ValueError) as exc:
            log.warning("`dynamo-redis router-state` cannot ask the router of %s: %s", self.endpoint, exc)

    async def _leave(self) -> None:
        """Take all that stands in the registry out, at once, and answer no more."""
        records = [record for served in self._served for record in served.release_registrations()]
        if self._record is not None:
            records.append(self._record)
        await withdraw(records)
        for served in self._served:
            await served.unregister()

    async def aclose(self) -> None:
        """End everything that it started. Requests under way go on. Idempotent."""
        closing, self._closing = self._closing, []
        await asyncio.gather(*(close() for close in closing))  # at once: each may wait for a silent Redis

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _make_index(self) -> None:
        settings = self._settings
        if settings.use_kv_events and self._runtime.settings.events.event_plane != "none":
            place = (self.endpoint.namespace, self.endpoint.component)
            self.indexer = Indexer(
                self._runtime,
                *place,
                settings,
                router_id=self.router_id,
                on_block_size=self._cards.note_block_size,
            )
            return
        self._predicted = PredictedIndex(
            ttl_s=settings.router_ttl_s,
            max_blocks=settings.router_max_tree_size,
            prune_target_ratio=settings.router_prune_target_ratio,
        )

    def _make_chooser(self) -> None:
        if self._runtime.settings.events.event_plane != "none":
            self._make_hearing()
        self._workers = Workers(self._client.dispatcher, self._cards, self._metrics, self._settings)
        index = self.indexer or self._predicted
        assert index is not None
        self.chooser = BookingChooser(
            self.router_id,
            index.find,
            self._workers,
            self._book,
            Selector(self._rng),
            self._lines,
            block_size=self.block_size,
            weights=self._weights,
            predict=None if self._predicted is None else self._predict,
            listener=self._sync,
        )

    def _make_hearing(self) -> None:
        """What tells of load that this router has not given: other routers, and the workers themselves."""
        runtime, place = self._runtime, (self.endpoint.namespace, self.endpoint.component)
        if self._settings.active_decode_blocks_threshold is not None:
            self._metrics = LoadMetrics(runtime.events, *place, self._book, on_change=self._lines.wake)
        if self._settings.router_replica_sync:
            # What others hear late they choose wrongly by: nothing waits for company.
            at_once = runtime.settings.events.model_copy(update={"event_linger_s": 0.0})
            self._sync = BookingSync(
                runtime.events,
                runtime.registry,
                *place,
                self._publisher,
                at_once,
                self._book,
                self._own_bookings,
            )

    def _own_bookings(self) -> Collection[Booking]:
        return self.chooser.bookings.values()

    def _predict(self, worker: Worker, hashes: Sequence[int]) -> None:
        assert self._predicted is not None
        self._predicted.predict(worker, hashes, SYSTEM_CLOCK.monotonic())

    # ----------------------------------------------------------------- requests

    async def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
    ) -> RoutedCall:
        """As `Client.generate`, at the worker that is best for the request's `token_ids`.

        It goes there with `dp_rank`, the rank chosen. Weights of its own it may bring as
        `router_config_override`. While all workers are busy it waits. Raises InvalidRequest, NoInstances,
        Overloaded and DeadlineExceeded besides what the call raises.
        """
        routing = self._routing(request, context, among)
        choice = await self.chooser.choose(routing)
        self.counts.request_count += 1
        route = BookedRoute(self._client.dispatcher, self.chooser, routing, choice)
        try:
            return RoutedCall(route, route.hop(request), bool(annotated), context, on_item=self._count)
        except BaseException:
            route.ended()
            raise

    async def best_worker(
        self,
        token_ids: Sequence[int],
        *,
        lora_name: str | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> Choice:
        """Whom a request with this prompt would go to now, and what each worker would cost; nothing is
        booked. Of `request` only its weights count. Raises NoInstances, InvalidRequest."""
        asked = {**(request or {}), "token_ids": token_ids, "lora_name": lora_name}
        return self.chooser.explain(self._routing(asked, None, None))

    @asynccontextmanager
    async def reserve(self, request: Any, context: Context | None = None) -> AsyncIterator[Choice]:
        """Choose for a request that somebody else sends: it is booked for as long as the block runs, and no
        longer than its deadline. Raises as `generate`."""
        routing = self._routing(request, context, None)
        choice = await self.chooser.choose(routing)
        self.counts.request_count += 1
        try:
            yield choice
        finally:
            self.chooser.free(routing.request_id)

    def _routing(
        self, request: Any, context: Context | None, among: Collection[int] | None
    ) -> RoutingRequest:
        token_ids = token_ids_of(request)
        deadline = None if context is None else context.deadline
        return RoutingRequest(
            # Not the request's own id: a client may send two with the same.
            request_id=f"{next(self._ids):x}",
            hashes=block_hashes(token_ids, self.block_size, request.get("lora_name")),
            token_count=len(token_ids),
            deadline=deadline if deadline is not None else SYSTEM_CLOCK.monotonic() + BOOKING_S,
            among=among,
            weights=weights_of(request, self._weights),
        )

    def _count(self, routing: RoutingRequest, choice: Choice, item: Any) -> bool:
        """Count what the worker found; some engines say so with the last item only."""
        cached = item.get("cached_tokens") if isinstance(item, dict) else None
        if not is_count(cached):
            return False
        self.counts.expected_tokens += choice.matched.device * self.block_size
        self.counts.prompt_tokens += routing.token_count
        self.counts.cached_tokens += cached
        return True

    # ----------------------------------------------------------------- who is there

    def instance_ids(self) -> list[int]:
        """As `Client.instance_ids`."""
        return self._client.instance_ids()

    def confirmed_instances(self) -> list[Instance]:
        """As `Client.confirmed_instances`."""
        return self._client.confirmed_instances()

    async def _tend(self) -> None:
        """End what is over: bookings past their deadline, predictions, and all of instances that left."""
        known = set(self._client.known_ids())
        while True:
            await self._client.wait_for_change(_TICK_S)
            now = SYSTEM_CLOCK.monotonic()
            present = set(self._client.known_ids())
            for instance_id in known - present:
                self._book.drop_instance(instance_id)
                self.forget_predictions(instance_id)
            known = present
            self._cards.forget_others(present)
            self.chooser.expire(now)
            self._book.expire(now)
            if self._predicted is not None:
                self._predicted.expire(now)
            if self._metrics is not None:
                self._metrics.expire()
            self._lines.wake()

    async def _stop_tending(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)

    def forget_predictions(self, instance_id: int) -> None:
        """An instance has emptied its cache, or left. No effect on what is known by events."""
        if self._predicted is not None:
            for worker in self._predicted.workers():
                if worker.instance_id == instance_id:
                    self._predicted.remove(worker)

    # ----------------------------------------------------------------- how it is

    def state(self) -> RouterState:
        """The router as it stands."""
        workers = list(self._workers.candidates(None, ()))
        return RouterState(
            router_id=self.router_id,
            endpoint=str(self.endpoint),
            instance_id=self._runtime.instance_id,
            block_size=self.block_size,
            mode="events" if self.indexer is not None else "predicted",
            synced=self._sync is not None,
            workers=describe_workers(workers, self._block_counts(), self._book.loads()),
            active_count=len(self.chooser.bookings),
            waiting_count=len(self._lines),
            counts=self.counts,
            index=self._index_state(),
        )

    def _block_counts(self) -> Mapping[Worker, int]:
        if self.indexer is not None:
            return self.indexer.index.block_counts()
        assert self._predicted is not None
        return self._predicted.block_counts()

    def _index_state(self) -> Mapping[str, Any]:
        if self.indexer is not None:
            return self.indexer.state().to_json()
        assert self._predicted is not None
        return {"block_count": self._predicted.block_count}
