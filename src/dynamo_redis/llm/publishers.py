"""Publishers of an engine's KV events and load for routers.

Create both publishers on the event loop; after that any thread may use them. They end with the runtime.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dynamo_redis.errors import ConfigError, StoreError
from dynamo_redis.events.engine_blocks import EngineHash
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.events.load_publisher import LoadPublisher
from dynamo_redis.events.worker_events import WorkerEvents
from dynamo_redis.names import EndpointName
from dynamo_redis.runtime.awaitables import started
from dynamo_redis.runtime.endpoint import Component, Endpoint
from dynamo_redis.runtime.runtime import DistributedRuntime
from dynamo_redis.wire.topics import KV_METRICS, LOAD_METRICS

if TYPE_CHECKING:
    from dynamo_redis.events.engine_zmq.relay import EventRelay

log = logging.getLogger(__name__)

_RETRY_S = 1.0


class KvEventPublisher:
    """The publisher of the KV events of one data-parallel rank of this worker.

    Create it before the endpoint is served. The endpoint `kv_dump` is served in the same component as soon as
    Redis answers. With `DYN_EVENT_PLANE=none` nothing is published.
    """

    def __init__(
        self,
        endpoint: Endpoint | Component,
        worker_id: int | None = None,
        kv_block_size: int = 0,
        dp_rank: int = 0,
        enable_local_indexer: bool = True,
        zmq_endpoint: str | None = None,
        zmq_topic: str | None = None,
        batching_timeout_ms: int | None = None,
        image_token_id: int | None = None,
        kv_state_endpoint: str | None = None,
        video_token_id: int | None = None,
    ) -> None:
        """Make the publisher of a rank. Raises ConfigError.

        With `zmq_endpoint` it publishes what the engine sends at that ZMQ socket, in the form of vLLM and
        SGLang. That needs the extra `engines`.

        Args:
            endpoint: any endpoint of the worker's component.
            worker_id: this process's instance id, or None.
            kv_block_size: tokens a block, the same for all ranks.
            dp_rank: the data-parallel rank.
            enable_local_indexer: without effect; there is always one.
            zmq_endpoint: the socket of this rank, as `tcp://127.0.0.1:5557`.
            zmq_topic: the topic of the messages to receive; None: all.
            batching_timeout_ms, image_token_id, video_token_id: without effect, named in the log.
            kv_state_endpoint: refused unless it is `endpoint`.
        """
        runtime, name = place_of(endpoint)
        if worker_id is not None and worker_id != runtime.instance_id:
            raise ConfigError(f"worker_id={worker_id} must be this process's instance, {runtime.instance_id}")
        if kv_block_size < 1:
            raise ConfigError(f"kv_block_size={kv_block_size} must be the engine's tokens a block")
        if kv_state_endpoint not in (None, str(name)):
            raise ConfigError(f"kv_state_endpoint={kv_state_endpoint!r}: events belong to {name} here")
        unused = {
            "batching_timeout_ms": batching_timeout_ms,
            "image_token_id": image_token_id,
            "video_token_id": video_token_id,
        }
        if given := [option for option, value in unused.items() if value is not None]:
            log.warning("KvEventPublisher: %s: no effect here", ", ".join(given))
        self._loop = _LoopThread()
        self._rank: KvPublisher | None = None
        self._relay: EventRelay | None = None
        if runtime.settings.events.event_plane == "none":
            return
        key = ("kv events", name.namespace, name.component)
        worker = runtime.attach(key, lambda: _SelfStartingEvents(runtime, name, kv_block_size))
        self._rank = worker.rank(dp_rank)
        if self._rank.block_size != kv_block_size:
            raise ConfigError(
                f"kv_block_size={kv_block_size} must be {self._rank.block_size} as other ranks'"
            )
        if zmq_endpoint is not None:
            relay = open_relay(self._rank, zmq_endpoint, zmq_topic or "")
            self._relay = runtime.attach(("kv relay", name, dp_rank, zmq_endpoint), lambda: relay)
            relay.start()

    @classmethod
    def of_rank(cls, rank: KvPublisher) -> KvEventPublisher:
        """Return a publisher that reports to `rank`, which the worker has published already."""
        publisher = cls.__new__(cls)
        publisher._loop = _LoopThread()
        publisher._rank, publisher._relay = rank, None
        return publisher

    def publish_stored(
        self,
        token_ids: Sequence[int],
        num_block_tokens: Sequence[int],
        block_hashes: Sequence[EngineHash],
        parent_hash: EngineHash | None = None,
        block_mm_infos: Sequence[Mapping[str, Any] | None] | None = None,
        lora_name: str | None = None,
        is_eagle: bool | None = None,
        cache_salt: str | None = None,
    ) -> None:
        """Publish that the engine has stored these blocks. Returns at once; never raises for Redis.

        Only full blocks of text tokens are published: those before the first block that is not full or has
        an image. Nothing is published for `is_eagle`.

        Args:
            token_ids: the tokens of all blocks.
            num_block_tokens: the number of tokens of each block.
            block_hashes: the engine's own hashes, one a block, in order.
            parent_hash: the engine's hash of the block before the first; None at the start of a sequence.
            block_mm_infos: for each block its images or other media, if any.
            lora_name: the adapter that computed the blocks.
            is_eagle: the blocks are of speculative decoding.
            cache_salt: the salt of the blocks, which separates them from other requests.
        """
        if (rank := self._rank) is None or is_eagle:
            return
        size = rank.block_size
        infos = block_mm_infos or [None] * len(num_block_tokens)
        pairs = enumerate(zip(num_block_tokens, infos, strict=False))
        count = next((n for n, (tokens, info) in pairs if tokens != size or info), len(num_block_tokens))
        hashes, block_tokens = tuple(block_hashes[:count]), tuple(token_ids[: count * size])
        if hashes:
            salt = cache_salt or None
            self._loop.call(
                lambda: rank.stored(hashes, block_tokens, parent_hash, lora_name=lora_name, cache_salt=salt)
            )

    def publish_removed(self, block_hashes: Sequence[EngineHash]) -> None:
        """Publish that the engine has removed these blocks. Returns at once."""
        if (rank := self._rank) is not None:
            hashes = tuple(block_hashes)
            self._loop.call(lambda: rank.removed(hashes))

    def publish_batch(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Publish several events in order.

        Each has the arguments of `publish_stored` or `publish_removed` and a `type`, "stored" or "removed".
        Raises ValueError or TypeError for an invalid event; the events before it are published then.
        """
        for event in events:
            kind, arguments = event.get("type"), {name: event[name] for name in event if name != "type"}
            if kind == "stored":
                self.publish_stored(**arguments)
            elif kind == "removed":
                self.publish_removed(**arguments)
            else:
                raise ValueError(f"type={kind!r} must be 'stored' or 'removed'")

    def publish_cleared(self) -> None:
        """Publish that the engine has emptied its KV cache. Returns at once."""
        if (rank := self._rank) is not None:
            self._loop.call(rank.cleared)

    def shutdown(self) -> None:
        """Publish that this rank holds no blocks, and nothing after that. Returns at once."""
        rank, relay = self._rank, self._relay
        self._rank = self._relay = None
        if rank is None:
            return
        if relay is None:
            self._loop.call(rank.cleared)
            return

        async def end() -> None:
            await relay.aclose()
            rank.cleared()

        def begin_to_end() -> None:
            started(end())

        self._loop.call(begin_to_end)


class WorkerMetricsPublisher:
    """The publisher of this worker's load.

    A rank's latest load is published at most four times a second, and again every two seconds.
    """

    def __init__(self) -> None:
        self._loop = _LoopThread()
        self._load: LoadPublisher | None = None

    def create_endpoint(self, endpoint: Endpoint | Component) -> asyncio.Task[None]:
        """Start to publish for the worker's component, and serve `load_metrics` there. Raises StoreError."""

        async def create() -> None:
            runtime, name = place_of(endpoint)
            key = ("load", name.namespace, name.component)
            load = runtime.attach(
                key,
                lambda: LoadPublisher(runtime.events, name.namespace, name.component, runtime.instance_id),
            )
            self._load = load
            if runtime.settings.events.event_plane != "none":
                load.start()

            async def load_metrics(_: Any) -> AsyncGenerator[dict[str, Any], None]:
                for event in load.values(KV_METRICS):
                    yield event | {"forward_pass": None}

            beside = EndpointName(name.namespace, name.component, LOAD_METRICS)
            if runtime.served(beside) is None:
                await runtime.endpoint(str(beside)).start_serving(load_metrics, graceful_shutdown=False)

        return started(create())

    def publish(
        self,
        dp_rank: int | None = None,
        active_decode_blocks: int | None = None,
        kv_used_blocks: int | None = None,
        *,
        kv_total_blocks: int | None = None,
        request_active_slots: int | None = None,
        request_total_slots: int | None = None,
        num_requests_waiting: int | None = None,
    ) -> None:
        """Publish the present load of a rank. Returns at once. Raises RuntimeError before `create_endpoint`.

        Args:
            dp_rank: the data-parallel rank; None: 0.
            active_decode_blocks: used if `kv_used_blocks` is None.
            kv_used_blocks: the number of blocks that running requests hold.
            kv_total_blocks: the rank's blocks; None: as in the model's card.
            request_active_slots: the number of requests that run.
            request_total_slots: the most requests that can run at once.
            num_requests_waiting: the number of requests that wait.
        """
        if (load := self._load) is None:
            raise RuntimeError("await create_endpoint first")
        rank = dp_rank or 0
        used = active_decode_blocks if kv_used_blocks is None else kv_used_blocks
        worker_stats = {
            "data_parallel_rank": rank,
            "request_active_slots": request_active_slots,
            "request_total_slots": request_total_slots,
            "num_requests_waiting": num_requests_waiting,
        }
        kv_stats: dict[str, float | None] = {"kv_active_blocks": used, "kv_total_blocks": kv_total_blocks}
        if used is not None and kv_total_blocks:
            kv_stats["gpu_cache_usage_perc"] = used / kv_total_blocks
        event = {"worker_stats": _without_none(worker_stats), "kv_stats": _without_none(kv_stats)}
        self._loop.call(lambda: load.set_value(KV_METRICS, rank, event))


class _SelfStartingEvents(WorkerEvents):
    """KV events that start with the first rank; it tries again every `_RETRY_S` until Redis answers."""

    def __init__(self, runtime: DistributedRuntime, name: EndpointName, block_size: int) -> None:
        super().__init__(runtime, name.namespace, name.component, block_size=block_size)
        self._rank_added = asyncio.Event()

        async def start_ranks() -> None:
            while True:
                await self._rank_added.wait()
                self._rank_added.clear()
                try:
                    await self.start()
                except StoreError as exc:
                    log.warning("routers cannot ask for KV blocks yet: %s", exc)
                    await asyncio.sleep(_RETRY_S)
                    self._rank_added.set()

        self._starter = asyncio.create_task(start_ranks(), name=f"KV events of {name}")

    def rank(self, dp_rank: int) -> KvPublisher:
        self._rank_added.set()
        return super().rank(dp_rank)

    async def aclose(self) -> None:
        self._starter.cancel()
        await asyncio.wait([self._starter])
        await super().aclose()


class _LoopThread:
    """The event loop's thread, on which calls from other threads are made, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def call(self, do: Callable[[], None]) -> None:
        if threading.get_ident() == self._thread:
            do()
            return
        with suppress(RuntimeError):  # the loop is closed, and with it the publisher
            self._loop.call_soon_threadsafe(do)


def open_relay(publisher: KvPublisher, endpoint: str, topic: str) -> EventRelay:
    """Return a relay of an engine's socket to a rank's publisher, not started. Raises ConfigError for a wrong
    endpoint, and without pyzmq."""
    try:
        from dynamo_redis.events.engine_zmq.relay import EventRelay
        from dynamo_redis.events.engine_zmq.wire import EventSource
    except ImportError as exc:
        raise ConfigError(
            f"KV events by ZMQ need pyzmq: pip install 'dynamo-redis[engines]' ({exc})"
        ) from exc
    try:
        return EventRelay([publisher], [EventSource(endpoint, topic=topic)])
    except ValueError as exc:
        raise ConfigError(f"ZMQ endpoint {endpoint!r}: {exc}") from exc


def place_of(endpoint: Endpoint | Component) -> tuple[DistributedRuntime, EndpointName]:
    """Return an endpoint's runtime and name; for a component those of its `generate`. Raises ConfigError."""
    if isinstance(endpoint, Component):
        endpoint = endpoint.endpoint("generate")
    runtime = endpoint.host
    if not isinstance(runtime, DistributedRuntime):
        raise ConfigError(f"{endpoint} does not belong to a DistributedRuntime")
    return runtime, endpoint.name


def _without_none(stats: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stats.items() if value is not None}
