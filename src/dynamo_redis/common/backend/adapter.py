"""An engine of the unified backend as an `Engine` of this package, so that `serve_engine` serves it.

The engine is code of users. Where it raises, returns something else, or does not return, the worker says so
and goes on, or ends: no request and no shutdown waits for it without a limit.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from dynamo_redis.common.backend import engine as unified
from dynamo_redis.common.backend.metrics import EngineMetrics
from dynamo_redis.common.backend.publisher import PushSource, SnapshotPublisher, ZmqSource
from dynamo_redis.engines.base import Engine, EngineCapacity, EngineLoad
from dynamo_redis.errors import (
    CannotConnect,
    ConfigError,
    ConnectionLost,
    EngineFailed,
    HandlerFailed,
    NoInstances,
    NotAccepted,
)
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.exposition import Family
from dynamo_redis.llm.publishers import KvEventPublisher, open_relay
from dynamo_redis.models.card import MAX_RANKS
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest, is_count
from dynamo_redis.planes.context import Context, Strength
from dynamo_redis.rate_limited_log import RateLimitedLog
from dynamo_redis.runtime.endpoint import Endpoint

if TYPE_CHECKING:
    from dynamo_redis.events.engine_zmq.relay import EventRelay

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE: Final = 16
"""Tokens a block in the card of an engine that does not say."""

_CONNECTION_ERRORS: Final = (CannotConnect, ConnectionLost, NotAccepted, NoInstances)
"""Errors of an engine's own connections. At a caller they would speak of the connection to this worker."""

_Answer = TypeVar("_Answer")


class AdaptedEngine(Engine):
    """An `LLMEngine` behind `serve_engine`. Call `begin` first, and `aclose` in any case."""

    def __init__(
        self,
        engine: unified.LLMEngine,
        endpoint: Endpoint,
        *,
        publishes: bool,
        labels: Mapping[str, str],
        abort_s: float,
        closing_s: float,
    ) -> None:
        """`publishes`: KV events and load are for routers. `labels` are those of its metrics. An `abort` may
        take `abort_s`, and `cleanup` `closing_s`."""
        self._engine = engine
        self._endpoint = endpoint
        self._publishes = publishes
        self._labels = labels
        self._abort_s = abort_s
        self._closing_s = closing_s
        self._registration = unified.LlmRegistration()
        self._sources: list[PushSource | ZmqSource] = []
        self._snapshots = SnapshotPublisher(())
        self._metrics = EngineMetrics(labels)
        self._load_time_s = 0.0
        self._running: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._relays: list[EventRelay] = []
        self._lines = RateLimitedLog(log)
        self._is_owed_cleanup = False
        # A default `abort` does nothing: it needs no task for each request that ends early.
        self._aborts = type(engine).abort is not unified.BaseEngine.abort

    # ----------------------------------------------------------------- start and end

    async def begin(self, worker_id: int) -> unified.EngineConfig:
        """Start the engine; return what it says of itself. Raises EngineFailed, ConfigError."""
        self._is_owed_cleanup = True
        began_at = perf_counter()
        config = await self._asked("start", self._engine.start(worker_id))
        self._load_time_s = perf_counter() - began_at
        if not isinstance(config, unified.EngineConfig):
            raise EngineFailed(f"the engine's start must return an EngineConfig, not {_shown(config)}")
        self._registration = config.llm or unified.LlmRegistration()
        _check(self._registration)
        return config

    async def start(self) -> None:
        """Ask the started engine for its KV events, load and metrics. Raises EngineFailed, ConfigError."""
        engine = self._engine
        if self._publishes:
            self._sources = await self._kv_event_sources()
            if ranks := engine.component_metrics_dp_ranks():
                self._snapshots = SnapshotPublisher(ranks)
                engine.attach_snapshot_publisher(self._snapshots)
        await self._asked("register_prometheus", engine.register_prometheus(self._metrics))
        await self._asked("on_endpoint_ready", engine.on_endpoint_ready(self._endpoint))

    async def health_check_payload(self) -> dict[str, Any] | None:
        """Return the engine's health check. Raises EngineFailed."""
        return await self._asked("health_check_payload", self._engine.health_check_payload())

    async def aclose(self) -> None:
        """Drain and clean up the engine once, each in `closing_s`. Raises EngineFailed if `cleanup` fails."""
        if not self._is_owed_cleanup:
            return
        self._is_owed_cleanup = False
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._closing_s)
        for relay in self._relays:
            await relay.aclose()
        try:
            await self._in_time("drain", self._engine.drain())
        except EngineFailed as exc:
            log.error("%s", exc, exc_info=exc.__cause__)
        await self._in_time("cleanup", self._engine.cleanup())

    async def _asked(self, hook: str, answer: Awaitable[_Answer]) -> _Answer:
        """Return what a hook of the engine returns. Raises EngineFailed, which names the hook."""
        try:
            return await answer
        except ConfigError:
            raise
        except Exception as exc:
            raise EngineFailed(f"the engine's {hook} raised {type(exc).__name__}: {exc}") from exc

    async def _in_time(self, hook: str, work: Awaitable[None]) -> None:
        """Wait for a hook of the engine for `closing_s`, then leave it. Raises EngineFailed."""
        task = asyncio.ensure_future(self._asked(hook, work))
        await asyncio.wait([task], timeout=self._closing_s)
        if not task.done():
            task.cancel()
            raise EngineFailed(f"the engine's {hook} did not return within {self._closing_s:g} s")
        task.result()

    # ----------------------------------------------------------------- KV events, load, metrics

    async def _kv_event_sources(self) -> list[PushSource | ZmqSource]:
        sources = await self._asked("kv_event_sources", self._engine.kv_event_sources())
        if sources and self._registration.kv_cache_block_size is None:
            log.warning(
                "EngineConfig.llm has no kv_cache_block_size: the engine's KV events are not published"
            )
            return []
        size, seen = self.capacity.data_parallel_size, set[int]()
        for source in sources:
            if not isinstance(source, PushSource | ZmqSource):
                raise ConfigError(f"kv_event_sources: {_shown(source)} is no PushSource or ZmqSource")
            if source.dp_rank in seen or not 0 <= source.dp_rank < size:
                raise ConfigError(f"kv_event_sources: one source for each rank below {size}: {source}")
            seen.add(source.dp_rank)
        return list(sources)

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        for source in self._sources:
            publisher = publishers[source.dp_rank]
            if isinstance(source, PushSource):
                source.on_ready(KvEventPublisher.of_rank(publisher))
            else:
                self._relay(source, publisher)

    def _relay(self, source: ZmqSource, publisher: KvPublisher) -> None:
        """Relay the events of a socket from now on. Raises ConfigError."""
        relay = open_relay(publisher, source.endpoint, source.topic)
        self._relays.append(relay)
        relay.start()

    def loads(self) -> Sequence[EngineLoad]:
        return [
            EngineLoad(
                dp_rank=last.dp_rank,
                running_count=self._running[last.dp_rank],
                waiting_count=None,
                active_blocks=last.kv_used_blocks,
                total_blocks=last.kv_total_blocks,
                prefix_hit_rate=last.kv_cache_hit_rate,
            )
            for last in self._snapshots.last()
        ]

    def metrics(self) -> list[Family]:
        """Return the engine's metrics, and those that the worker knows of it."""
        loaded = Family(
            "dynamo_component_model_load_time_seconds", "gauge", "Seconds that the engine's start took"
        )
        total = Family("dynamo_component_total_blocks", "gauge", "KV blocks of a rank")
        usage = Family(
            "dynamo_component_gpu_cache_usage_percent", "gauge", "Used part of a rank's KV cache, 0 to 1"
        )
        hits = Family(
            "dynamo_component_kv_cache_hit_rate", "gauge", "Part of prompts found in a rank's cache, 0 to 1"
        )
        for last in self._snapshots.last():
            labels = {**self._labels, "dp_rank": str(last.dp_rank)}
            total.add(last.kv_total_blocks, labels)
            usage.add(last.gpu_cache_usage, labels)
            if last.kv_cache_hit_rate is not None:
                hits.add(last.kv_cache_hit_rate, labels)
        return [loaded.add(self._load_time_s, self._labels), total, usage, hits, *self._metrics.families()]

    @property
    def capacity(self) -> EngineCapacity:
        said = self._registration
        return EngineCapacity(
            total_kv_blocks=said.total_kv_blocks,
            kv_block_size=said.kv_cache_block_size or DEFAULT_BLOCK_SIZE,
            max_num_seqs=said.max_num_seqs,
            max_num_batched_tokens=said.max_num_batched_tokens,
            data_parallel_size=said.data_parallel_size or 1,
            context_length=said.context_length,
        )

    # ----------------------------------------------------------------- requests

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Answer by the engine, as `Engine` describes. Raises HandlerFailed for an item that is none, and
        EngineFailed for an answer without an end."""
        asked = cast("unified.GenerateRequest", dict(request))
        if (dp_rank := request.get("dp_rank")) is not None:
            asked["routing"] = {"dp_rank": dp_rank}
        unsubscribe = self._abort_when_cancelled(context)
        self._running[dp_rank or 0] += 1
        has_ended = False
        try:
            async with aclosing(_generator(self._engine.generate(asked, context))) as chunks:
                async for chunk in chunks:
                    item = read_chunk(chunk)
                    has_ended = "finish_reason" in item
                    yield item
                    if has_ended or context.is_stopped():
                        break
            if not has_ended and not context.is_stopped():
                raise EngineFailed("the engine ended its answer without a finish_reason")
        except _CONNECTION_ERRORS as exc:
            raise EngineFailed(f"{type(exc).__name__}: {exc}") from exc
        except HandlerFailed as exc:
            self._lines.log("request %s: %s", context.id(), exc, kind=str(exc))
            raise
        finally:
            self._running[dp_rank or 0] -= 1
            unsubscribe()

    def _abort_when_cancelled(self, context: Context) -> Callable[[], None]:
        """Call the engine's `abort` once if the request is stopped or killed before the returned function
        was called."""
        if not self._aborts:
            return lambda: None
        is_aborted = False

        def on_cancelled(_: Strength) -> None:
            nonlocal is_aborted
            if not is_aborted:
                is_aborted = True
                self._keep(asyncio.create_task(self._abort(context), name=f"abort of {context.id()}"))

        return context.on_cancel(on_cancelled)

    async def _abort(self, context: Context) -> None:
        try:
            async with asyncio.timeout(self._abort_s):
                await self._engine.abort(context)
        except Exception as exc:  # noqa: BLE001 - the engine is the user's
            self._lines.log(
                "request %s: the engine's abort failed: %r", context.id(), exc, kind="abort", exc_info=exc
            )

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _generator(chunks: Any) -> AsyncGenerator[Any, None]:
    """Return what `generate` has returned. Raises HandlerFailed if it is no async generator."""
    if isinstance(chunks, AsyncGenerator):
        return chunks
    if isinstance(chunks, Coroutine):
        chunks.close()
    raise HandlerFailed("the engine's generate must be an async generator: `async def` with `yield`")


def read_chunk(chunk: Any) -> GenerateItem:
    """Return an engine's item as frontends take it. Raises HandlerFailed if it is none."""
    if not isinstance(chunk, Mapping):
        raise HandlerFailed(f"the engine yielded {_shown(chunk)}: an item is a dict")
    token_ids, reason = chunk.get("token_ids"), chunk.get("finish_reason")
    if not isinstance(token_ids, list | tuple) or not all(
        type(token) is int and 0 <= token < 1 << 32 for token in token_ids
    ):
        raise HandlerFailed(
            f"the engine yielded token_ids={_shown(token_ids)}: a list of token ids is wanted"
        )
    if not isinstance(reason, str | None):
        raise HandlerFailed(f"the engine yielded finish_reason={_shown(reason)}: a word is wanted")
    item = {key: value for key, value in chunk.items() if value is not None}
    item["token_ids"] = list(token_ids)
    if item.get("index") == 0:
        del item["index"]
    if reason == "abort":
        item["finish_reason"] = "cancelled"
    usage = item.get("completion_usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    if is_count(cached):
        item.setdefault("cached_tokens", cached)
    return cast("GenerateItem", item)


def _check(said: unified.LlmRegistration) -> None:
    """Raise ConfigError for sizes that are none, and log what has no effect."""
    sizes = ("context_length", "kv_cache_block_size", "total_kv_blocks", "max_num_seqs")
    for name in (*sizes, "max_num_batched_tokens", "data_parallel_size"):
        value = getattr(said, name)
        limit = MAX_RANKS if name == "data_parallel_size" else (1 << 63) - 1
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise ConfigError(f"EngineConfig.llm.{name}={_shown(value)} must be an integer from 1 to {limit}")
    if said.data_parallel_start_rank:
        raise ConfigError(
            f"data_parallel_start_rank={said.data_parallel_start_rank}: a worker's ranks begin at 0 here"
        )
    unused = ("bootstrap_host", "bootstrap_port", "enable_eagle", "max_gpu_lora_count")
    if given := [name for name in unused if getattr(said, name)]:
        log.warning("EngineConfig.llm: %s: not known here, no effect", ", ".join(given))


def _shown(value: object) -> str:
    """Return the beginning of a value's `repr`; its type, if that raises."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the value is the user's
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"
