"""Publishers that tell routers of an engine's KV cache and load.

Both publishers are made on the event loop, and may then be used from any thread. They end with the runtime.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

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

log = logging.getLogger(__name__)

_RETRY_S = 1.0


class KvEventPublisher:
    """Tells routers what one data-parallel rank of this worker holds in its KV cache.

    Make it before the endpoint is served. `kv_dump` is served beside the endpoint as soon as Redis answers.
    With `DYN_EVENT_PLANE=none` nothing is told.
    """

    def __init__(
        self,
        endpoint: Endpoint | Component,
        worker_id: int | None = None,
        kv_block_size: int = 0,
        dp_rank: int = 0,
        enable_local_indexer: bool = True,
    ) -> None:
        """`endpoint` is any of the worker's component. `worker_id`, if given, is this process's instance id.
        `enable_local_indexer` is accepted: there always is one. Raises ConfigError."""
        runtime, name = place_of(endpoint)
        if worker_id is not None and worker_id != runtime.instance_id:
            raise ConfigError(f"worker_id={worker_id} must be this process's instance, {runtime.instance_id}")
        if kv_block_size < 1:
            raise ConfigError(f"kv_block_size={kv_block_size} must be the engine's tokens a block")
        self._loop = _Loop()
        self._rank: KvPublisher | None = None
        if runtime.settings.events.event_plane == "none":
            return
        key = ("kv events", name.namespace, name.component)
        worker = runtime.attach(key, lambda: _OwnEvents(runtime, name, kv_block_size))
        self._rank = worker.rank(dp_rank)
        if self._rank.block_size != kv_block_size:
            raise ConfigError(
                f"kv_block_size={kv_block_size} must be {self._rank.block_size} as other ranks'"
            )

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
        """The engine holds these blocks now, one after the other, behind `parent_hash` (None: at the start).

        `num_block_tokens` are the tokens of each block. Hashes are the engine's own. Left out is what has no
        name here: what follows a block that is not full, or one with an image (`block_mm_infos`), and all
        blocks of `is_eagle` or with a `cache_salt`. Returns at once; never raises for Redis.
        """
        if (rank := self._rank) is None or is_eagle or cache_salt:
            return
        size = rank.block_size
        count = _plain_count(num_block_tokens, block_mm_infos, size)
        hashes, tokens = tuple(block_hashes[:count]), tuple(token_ids[: count * size])
        if hashes:
            self._loop.call(lambda: rank.stored(hashes, tokens, parent_hash, lora_name=lora_name))

    def publish_removed(self, block_hashes: Sequence[EngineHash]) -> None:
        """The engine holds these blocks no longer. Returns at once."""
        if (rank := self._rank) is not None:
            hashes = tuple(block_hashes)
            self._loop.call(lambda: rank.removed(hashes))

    def publish_batch(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Several events in order, each the arguments of `publish_stored` or `publish_removed` with a `type`,
        "stored" or "removed". Raises ValueError or TypeError for what is neither; some may be told then."""
        for event in events:
            kind, arguments = event.get("type"), {name: event[name] for name in event if name != "type"}
            if kind == "stored":
                self.publish_stored(**arguments)
            elif kind == "removed":
                self.publish_removed(**arguments)
            else:
                raise ValueError(f"type={kind!r} must be 'stored' or 'removed'")

    def publish_cleared(self) -> None:
        """The engine has emptied its cache. Returns at once."""
        if (rank := self._rank) is not None:
            self._loop.call(rank.cleared)

    def shutdown(self) -> None:
        """Tell no more, and take back what was told: routers no longer count on this rank's blocks."""
        self.publish_cleared()
        self._rank = None


class WorkerMetricsPublisher:
    """Tells routers how loaded this worker is. Its values are told at most four times a second, the last one
    wins, and each again every two seconds."""

    def __init__(self) -> None:
        self._loop = _Loop()
        self._load: LoadPublisher | None = None

    def create_endpoint(self, endpoint: Endpoint | Component) -> asyncio.Task[None]:
        """Begin, for the worker's component, and serve `load_metrics` there. Raises StoreError."""
        return started(self._create_endpoint(endpoint))

    async def _create_endpoint(self, endpoint: Endpoint | Component) -> None:
        runtime, name = place_of(endpoint)
        key = ("load", name.namespace, name.component)
        load = runtime.attach(
            key,
            lambda: LoadPublisher(
                runtime.events, runtime.registry, name.namespace, name.component, runtime.instance_id
            ),
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
        """This is a rank's load now (None: rank 0). Returns at once.

        `kv_used_blocks` are those that running requests hold, or without it `active_decode_blocks`. Without
        `kv_total_blocks` routers take what the model's card says. Raises RuntimeError before
        `create_endpoint`.
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
        event = {"worker_stats": _known(worker_stats), "kv_stats": _known(kv_stats)}
        self._loop.call(lambda: load.tell(KV_METRICS, rank, event))


class _OwnEvents(WorkerEvents):
    """Starts by itself, again and again until Redis answers."""

    def __init__(self, runtime: DistributedRuntime, name: EndpointName, block_size: int) -> None:
        super().__init__(runtime, name.namespace, name.component, block_size=block_size)
        self._more = asyncio.Event()
        self._starter = asyncio.create_task(self._keep_starting(), name=f"KV events of {name}")

    def rank(self, dp_rank: int) -> KvPublisher:
        self._more.set()
        return super().rank(dp_rank)

    async def aclose(self) -> None:
        self._starter.cancel()
        await asyncio.wait([self._starter])
        await super().aclose()

    async def _keep_starting(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            try:
                await self.start()
            except StoreError as exc:
                log.warning("routers cannot ask for KV blocks yet: %s", exc)
                await asyncio.sleep(_RETRY_S)
                self._more.set()


class _Loop:
    """The event loop's thread: what others want done there, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def call(self, do: Callable[[], None]) -> None:
        if threading.get_ident() == self._thread:
            do()
            return
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(do)


def place_of(endpoint: Endpoint | Component) -> tuple[DistributedRuntime, EndpointName]:
    """The runtime and the name of any endpoint of the component."""
    one = endpoint.endpoint("generate") if isinstance(endpoint, Component) else endpoint
    runtime = one.host
    if not isinstance(runtime, DistributedRuntime):
        raise ConfigError(f"{one} does not belong to a DistributedRuntime")
    return runtime, one.name


def _plain_count(
    num_block_tokens: Sequence[int], block_mm_infos: Sequence[Mapping[str, Any] | None] | None, size: int
) -> int:
    """How many of the blocks, from the first on, are full and made of tokens alone."""
    infos = block_mm_infos or [None] * len(num_block_tokens)
    for index, (tokens, info) in enumerate(zip(num_block_tokens, infos, strict=False)):
        if tokens != size or info:
            return index
    return len(num_block_tokens)


def _known(stats: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stats.items() if value is not None}
