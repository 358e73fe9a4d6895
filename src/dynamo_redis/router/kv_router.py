"""The router as frontends and `dynamo-redis router` use it: it puts index, choice, booking and calls
together."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any, Self

from dynamo_redis.clock import SYSTEM_CLOCK
from dynamo_redis.config import RouterSettings
from dynamo_redis.errors import ConfigError
from dynamo_redis.events.router_record import register_router
from dynamo_redis.histogram import Histogram
from dynamo_redis.models.llm_protocol import is_count
from dynamo_redis.names import EndpointName, format_instance_id
from dynamo_redis.planes.context import Context
from dynamo_redis.router.answering import serve_answers
from dynamo_redis.router.base import (
    BusyThresholds,
    CostWeights,
    RoutingRequest,
    Worker,
    WorkerChoice,
)
from dynamo_redis.router.choice.booking import BookingChooser
from dynamo_redis.router.choice.booking_sync import BookingSync, owner_name
from dynamo_redis.router.choice.load_book import LoadBook
from dynamo_redis.router.choice.load_metrics import LoadMetrics
from dynamo_redis.router.choice.selector import PolicySelector, Selector
from dynamo_redis.router.choice.waiting_line import WaitingLines
from dynamo_redis.router.choice.workers import WorkerCards, Workers
from dynamo_redis.router.index.indexer import Indexer
from dynamo_redis.router.index.predicted_index import PredictedIndex
from dynamo_redis.router.metrics import HIT_RATES, router_families
from dynamo_redis.router.prompts import prompt_size, weights_of
from dynamo_redis.router.routed_call import BookedRoute, RoutedCall
from dynamo_redis.router.router_state import Counts, RouterState, describe_workers
from dynamo_redis.runtime import tracing
from dynamo_redis.runtime.client import Client
from dynamo_redis.runtime.discovery import Member
from dynamo_redis.runtime.instance import Instance
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.runtime.selection import Policy
from dynamo_redis.runtime.serving import ServedEndpoint
from dynamo_redis.runtime.withdrawal import withdraw
from dynamo_redis.store.base import Registration
from dynamo_redis.supervision import Supervisor
from dynamo_redis.wire.event import PublisherId

log = logging.getLogger(__name__)

BOOKING_S = 600.0
"""Longest booking of a request without a deadline: the frontend's own limit."""

_TICK_S = 1.0
"""Longest pause between two checks for bookings and predictions that have expired."""
_SYNC_START_S = 2.0
"""Longest wait at the start for the bookings in the stream."""
_PEERS_S = 1.0
"""Longest wait at the start for the bookings of the routers that run."""
_BLOCK_SIZE_S = 2.0
"""Longest wait at the start for a worker that reports its block size."""
_USUAL_BLOCK_SIZE = 16


class KvRouter:
    """Routes the requests of one endpoint: each to the worker where its cost is lowest, by the blocks of its
    prompt that the worker holds and by the worker's load.

    Use it as `async with`, or call `start` and `aclose`. It takes the place of a `Client` of the endpoint. It
    follows the workers' KV events. With `use_kv_events` off, or without an event plane, it predicts the
    workers' blocks from its own choices. With a policy it knows no blocks, and the policy chooses among the
    workers that are not busy. While Redis is away it chooses by its last knowledge.

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
        policy: Policy | None = None,
    ) -> None:
        """`block_size` is used if the settings have none. Without both it is the block size of the first
        worker that reports one, by its model card or with its KV events; until then blocks have 16 tokens.
        `policy` chooses in place of the costs."""
        self.endpoint = endpoint
        self._runtime = runtime
        self._settings = settings if policy is None else settings.model_copy(update={"use_kv_events": False})
        self._policy = policy
        self._busy = BusyThresholds(*(getattr(settings, field.name) for field in fields(BusyThresholds)))
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
        """Its counts since it was made."""
        self._hit_rates = Histogram(HIT_RATES)
        self._lines = WaitingLines(settings.router_queue_count, settings.router_queue_wait_s)
        given_block_size = settings.kv_cache_block_size or block_size
        self.block_size = given_block_size or _USUAL_BLOCK_SIZE
        """Number of tokens in a block."""
        self._learns_block_size = given_block_size is None
        self._cards = WorkerCards(
            runtime.registry, endpoint, self._use_block_size if self._learns_block_size else None
        )
        self._client: Client
        self._book = LoadBook()
        self._workers: Workers
        self._predicted: PredictedIndex | None = None
        self._metrics: LoadMetrics | None = None
        self._has_warned = False
        self._sync: BookingSync | None = None
        self._record: Registration | None = None
        self._served: list[ServedEndpoint] = []
        self._supervisor = Supervisor(log, f"router of {endpoint}")
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self.chooser: BookingChooser
        """Valid after `start`."""
        self.indexer: Indexer | None = None
        """None if the router predicts."""

    # ----------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Start the router; return when it can choose, within seconds, also if there is no worker.

        Raises StoreError; then nothing stays open.
        """
        try:
            await self._start()
        except BaseException:
            await self.aclose()
            raise

    async def _start(self) -> None:
        """Start all parts; `_closing` gets the function that ends each."""
        closes = self._closing.append
        self._client = await self._runtime.endpoint(str(self.endpoint)).client()
        closes(self._client.aclose)
        self._cards.start()
        closes(self._cards.aclose)
        index = self._make_index()
        self._make_chooser(index)
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
        self._follow_load(self._busy)
        tending = asyncio.create_task(self._supervisor.run(self._tend), name=f"router of {self.endpoint}")

        async def stop_tending() -> None:
            tending.cancel()
            await asyncio.gather(tending, return_exceptions=True)

        closes(stop_tending)
        await asyncio.gather(*starting)
        if self._learns_block_size:
            has_workers = bool(self._client.known_ids())
            if not await self._cards.wait_for_block_size(_BLOCK_SIZE_S if has_workers else 0.0):
                log.info(
                    "no worker of %s has reported the size of its KV blocks yet: until one does, blocks of "
                    "%d tokens are assumed",
                    self.endpoint,
                    self.block_size,
                )
        self._record = await register_router(
            self._runtime, self.endpoint.namespace, self.endpoint.component, self.router_id, self._settings
        )
        closes(self._leave)
        end_metrics = self._runtime.add_metrics(lambda: router_families(self.state(), self._hit_rates.read()))

        async def stop_metrics() -> None:
            end_metrics()

        closes(stop_metrics)
        if self._sync is not None:
            await self._sync.wait_for_peers(_PEERS_S)
        try:
            self._served = await serve_answers(self._runtime, self)
        except (ConfigError, ValueError) as exc:
            log.warning("`dynamo-redis router-state` cannot ask the router of %s: %s", self.endpoint, exc)

    def _follow_load(self, busy: BusyThresholds) -> None:
        """Have the workers' load reports read from now on, if a threshold needs them."""
        if busy.active_decode_blocks_threshold is None:
            return
        if self._metrics is not None:
            self._metrics.start()
        elif not self._has_warned:
            self._has_warned = True
            log.warning(
                "DYN_EVENT_PLANE=none: workers of %s cannot report their load, and the threshold of blocks "
                "is compared with the blocks of the prompts that were sent from here",
                self.endpoint,
            )

    async def count_load(self) -> None:
        """Have the workers' load reports read from now on: they correct the load by its bookings."""
        if self._metrics is not None:
            self._metrics.start()

    def _use_block_size(self, block_size: int) -> None:
        """Take the block size that the workers report."""
        if block_size != self.block_size:
            log.info("KV blocks of %s have %d tokens", self.endpoint, block_size)
        self.block_size = block_size
        self.chooser.use_block_size(block_size)
        self._expect_cards()

    def _expect_cards(self) -> None:
        """Have the workers' cards checked against the router's block size and event plane."""
        followed = None if self.indexer is None else self._runtime.settings.events.event_plane
        self._cards.expect(self.block_size, followed)

    async def _leave(self) -> None:
        """Remove all records of this router from the registry, at once, and close its endpoints."""
        records = [record for served in self._served for record in served.release_registrations()]
        if self._record is not None:
            records.append(self._record)
        await withdraw(records)
        for served in self._served:
            await served.unregister()

    async def aclose(self) -> None:
        """End all parts. Requests under way go on. Idempotent."""
        closing, self._closing = self._closing, []
        await asyncio.gather(*(close() for close in closing))  # at once: each may wait for a silent Redis

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _make_index(self) -> Indexer | PredictedIndex:
        """Make the index: by KV events, or predicted."""
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
            return self.indexer
        self._predicted = PredictedIndex(
            ttl_s=settings.router_ttl_s,
            max_blocks=settings.router_max_tree_size,
            prune_target_ratio=settings.router_prune_target_ratio,
        )
        return self._predicted

    def _make_chooser(self, index: Indexer | PredictedIndex) -> None:
        """Make the chooser, and the readers of load that is not of this router's own choices: the workers'
        reports, and the bookings of other routers."""
        runtime, place = self._runtime, (self.endpoint.namespace, self.endpoint.component)
        events = runtime.settings.events
        has_events = events.event_plane != "none"
        if has_events:
            self._metrics = LoadMetrics(runtime.events, *place, self._book, on_change=self._lines.wake)
        if has_events and self._settings.router_replica_sync:
            self._sync = BookingSync(
                runtime.events,
                runtime.registry,
                *place,
                self._publisher,
                # Events are not held back to fill a batch: late bookings make other routers choose wrongly.
                events.model_copy(update={"event_linger_s": 0.0}),
                self._book,
                lambda: self.chooser.bookings.values(),
            )

        def predict(worker: Worker, hashes: Sequence[int]) -> None:
            if self._predicted is not None:
                self._predicted.predict(worker, hashes, SYSTEM_CLOCK.monotonic())

        predicts = self._predicted is not None and self._policy is None
        self._workers = Workers(self._client.dispatcher, self._cards, self._metrics)
        self.chooser = BookingChooser(
            self.router_id,
            index.find,
            self._workers,
            self._book,
            Selector(self._rng) if self._policy is None else PolicySelector(self._policy),
            self._lines,
            block_size=self.block_size,
            weights=self._weights,
            predict=predict if predicts else None,
            listener=self._sync,
        )

    # ----------------------------------------------------------------- requests

    async def generate(
        self,
        request: Any,
        annotated: bool | None = True,
        context: Context | None = None,
        *,
        among: Collection[int] | None = None,
        busy: BusyThresholds | None = None,
    ) -> RoutedCall:
        """As `Client.generate`, at the worker that is best for the request's `token_ids`.

        The worker gets the rank chosen as `dp_rank`. A request may bring its own weights as
        `router_config_override`. While all workers are busy it waits, for `router_queue_wait_s` at most:
        busy by the thresholds `busy`, or by those of the settings. Raises InvalidRequest, NoInstances,
        Overloaded and DeadlineExceeded, beside the errors of the call.
        """
        if busy is not None:
            self._follow_load(busy)
        routing = self._routing(request, context, among, busy)
        choice = await self._choose(routing, context)
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
    ) -> WorkerChoice:
        """Return the worker that a request with this prompt would go to now, with the costs of all workers,
        and book nothing. Of `request` only its weights count. Raises NoInstances, InvalidRequest."""
        asked = {**(request or {}), "token_ids": token_ids, "lora_name": lora_name}
        return self.chooser.explain(self._routing(asked, None, None))

    def is_blind(self) -> bool:
        """Return whether it chooses now without the blocks of a listed worker; False if it follows none."""
        return self.indexer is not None and not self.indexer.is_whole()

    @asynccontextmanager
    async def reserve(self, request: Any, context: Context | None = None) -> AsyncIterator[WorkerChoice]:
        """Choose a worker for a request that another process sends. It is booked while the block runs, and no
        longer than its deadline. Raises as `generate`."""
        routing = self._routing(request, context, None)
        choice = await self._choose(routing, context)
        try:
            yield choice
        finally:
            self.chooser.free(routing.request_id)

    async def _choose(self, routing: RoutingRequest, context: Context | None) -> WorkerChoice:
        """Choose a worker and count the choice, in a span of its own while traces are exported."""
        span = None
        if tracing.tracer is not None and context is not None:
            span = tracing.tracer.begin("choose worker", "internal", context.traceparent)
        try:
            choice = await self.chooser.choose(routing)
        except BaseException as exc:
            if span is not None:
                span.fail_with(exc)
                span.end()
            raise
        expected_count = choice.matched.device * self.block_size
        self.counts.request_count += 1
        self.counts.blind_count += self.is_blind()
        self._hit_rates.add(min(expected_count / max(routing.token_count, 1), 1.0))
        if span is not None:
            span.set(
                {
                    "dynamo.instance.id": format_instance_id(choice.worker.instance_id),
                    "dynamo.router.cached_tokens": expected_count,
                }
            )
            span.end()
        return choice

    def _routing(
        self,
        request: Any,
        context: Context | None,
        among: Collection[int] | None,
        busy: BusyThresholds | None = None,
    ) -> RoutingRequest:
        """Read from a request the parts that a choice depends on. Raises InvalidRequest."""
        hashes, token_count = prompt_size(request, self.block_size)
        deadline = None if context is None else context.deadline
        return RoutingRequest(
            # Not the request's own id: a client may send two with the same.
            request_id=f"{next(self._ids):x}",
            hashes=hashes,
            token_count=token_count,
            deadline=deadline if deadline is not None else SYSTEM_CLOCK.monotonic() + BOOKING_S,
            among=among,
            weights=weights_of(request, self._weights),
            busy=busy or self._busy,
        )

    def _count(self, routing: RoutingRequest, choice: WorkerChoice, item: Any) -> bool:
        """Count the tokens that the worker found in its cache; return whether `item` has their number. Some
        engines send it with the last item only."""
        cached = item.get("cached_tokens") if isinstance(item, dict) else None
        if not is_count(cached):
            return False
        self.counts.expected_tokens += choice.matched.device * self.block_size
        self.counts.prompt_tokens += routing.token_count
        self.counts.cached_tokens += cached
        return True

    # ----------------------------------------------------------------- instances

    def instance_ids(self) -> list[int]:
        """As `Client.instance_ids`."""
        return self._client.instance_ids()

    def confirmed_instances(self) -> list[Instance]:
        """As `Client.confirmed_instances`."""
        return self._client.confirmed_instances()

    def members(self) -> list[Member]:
        """As `Client.members`."""
        return self._client.members()

    def busy_ids(self, busy: BusyThresholds) -> set[int]:
        """Return the ids of the instances all of whose ranks are busy by these thresholds."""
        workers = self._workers.candidates(None, ())
        free = self._workers.without_busy(workers, self._book, busy)
        return {worker.instance_id for worker in workers} - {worker.instance_id for worker in free}

    async def _tend(self) -> None:
        """End bookings past their deadline, old predictions, and all bookings and predictions of instances
        that left; let waiting requests try again."""
        known = set(self._client.known_ids())
        while True:
            await self._client.wait_for_change(_TICK_S)
            now = SYSTEM_CLOCK.monotonic()
            present = set(self._client.known_ids())
            for instance_id in known - present:
                self._book.drop_instance(instance_id)
                self.forget_predictions(instance_id)
            known = present
            self._cards.forget_unlisted(present)
            self.chooser.expire(now)
            self._book.expire(now)
            if self._predicted is not None:
                self._predicted.expire(now)
            if self._metrics is not None:
                self._metrics.expire()
            self._lines.wake()

    def forget_predictions(self, instance_id: int) -> None:
        """Forget the predictions of an instance that has emptied its cache, or left. No effect on an index by
        KV events."""
        if self._predicted is not None:
            for worker in self._predicted.workers():
                if worker.instance_id == instance_id:
                    self._predicted.remove(worker)

    # ----------------------------------------------------------------- state

    def state(self) -> RouterState:
        """Return the present state, for `router-state` and metrics."""
        index: Mapping[str, Any]
        if self.indexer is not None:
            block_counts, index = self.indexer.index.block_counts(), self.indexer.state().to_json()
        else:
            assert self._predicted is not None
            block_counts = self._predicted.block_counts()
            index = {"block_count": self._predicted.block_count}
        workers = list(self._workers.candidates(None, ()))
        return RouterState(
            router_id=self.router_id,
            endpoint=str(self.endpoint),
            instance_id=self._runtime.instance_id,
            block_size=self.block_size,
            mode="events" if self.indexer is not None else "predicted" if self._policy is None else "load",
            synced=self._sync is not None,
            workers=describe_workers(workers, block_counts, self._book.loads()),
            active_count=len(self.chooser.bookings),
            waiting_count=len(self._lines),
            counts=self.counts,
            index=index,
        )
