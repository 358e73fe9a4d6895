"""An OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp's server, or another.

The server runs as a process of its own and is not modified. This engine forwards requests to it, polls its
health and load, and relays its KV events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final

import anyio.to_thread

from dynamo_redis.config import OpenAIEngineSettings
from dynamo_redis.engines.base import EngineCapacity, EngineLoad
from dynamo_redis.engines.model_tokens import ModelTokens
from dynamo_redis.engines.openai.dialects import Dialect
from dynamo_redis.engines.openai.http import Completion
from dynamo_redis.engines.openai.request import (
    chat_completion_body,
    completion_body,
    hidden_stop_ids,
    prompt_ids,
    token_limit,
    wanted_rank,
)
from dynamo_redis.engines.openai.server import EngineServer
from dynamo_redis.engines.openai.wire import CompletionReader, UnknownModel
from dynamo_redis.errors import (
    ConfigError,
    ConnectionLost,
    ContextLengthExceeded,
    Draining,
    HandlerFailed,
    InvalidRequest,
    PlaneError,
    RequestCancelled,
)
from dynamo_redis.events.engine_zmq.relay import EventRelay, rank_sources
from dynamo_redis.events.engine_zmq.wire import EventSource
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.directory import ModelDirectory
from dynamo_redis.models.llm_protocol import GenerateItem, GenerateRequest
from dynamo_redis.planes.context import Context
from dynamo_redis.runtime.handlers import AnyHandler
from dynamo_redis.supervision import Supervisor

log = logging.getLogger(__name__)

_FLUSH_PATHS: Final[Mapping[Dialect, str]] = {"vllm": "/reset_prefix_cache", "sglang": "/flush_cache"}
_FLUSH_S: Final = 10.0
"""Time-out of a request to clear the prefix cache."""
_CLEAR_AGAIN_S: Final = 10.0
"""Least seconds between two such requests of this engine's own."""


class OpenAIEngine:
    """An `Engine` over HTTP.

    It owns one task that polls the server's health and load, and with `follow` one task a rank for KV events.
    """

    def __init__(
        self,
        settings: OpenAIEngineSettings,
        model: ModelDirectory,
        *,
        context_length: int | None = None,
    ) -> None:
        """Make the engine. `context_length` is an upper limit for the length that the server reports.

        Raises ConfigError if the settings contradict each other.
        """
        if settings.kv_replay_endpoint and not settings.kv_events_endpoint:
            raise ConfigError("DYN_KV_REPLAY_ENDPOINT is of no use without DYN_KV_EVENTS_ENDPOINT")
        self._server = EngineServer(
            settings,
            context_length=context_length,
            on_down=self._note_down,
            on_identified=self._resize_publishers,
        )
        self._settings = settings
        self._model = model
        self._prompt_as_text = settings.engine_prompt == "text"
        self._tokens: ModelTokens | None = None
        self._running_count = 0
        self._unanswered: set[Completion] = set()
        self._clearing = False
        self._clear_again_at = 0.0
        self._poll_now = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        self._publishers: Sequence[KvPublisher] = ()
        self._followed: Sequence[EventSource] = ()
        self.relay: EventRelay | None = None

    def __repr__(self) -> str:
        state = "up" if self._server.up.is_set() else "down"
        running = f"{self._running_count} running"
        return f"<OpenAIEngine {self._server.listed.dialect} at {self._server.http.url}, {state}, {running}>"

    @property
    def capacity(self) -> EngineCapacity:
        return self._server.capacity

    # ----------------------------------------------------------------- start and end

    async def wait_until_up(self) -> None:
        """See `EngineServer.wait_until_up`."""
        await self._server.wait_until_up()

    async def start(self) -> None:
        """Wait for the server, identify it, and start to poll its health and load. Raises ConfigError,
        ModelError."""

        async def poll() -> None:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.engine_poll_interval_s):
                        await self._poll_now.wait()  # set by a request that has found no server
                self._poll_now.clear()
                if await self._server.check():
                    await self._server.poll_metrics()
                    self._resize_publishers()
                    await self._follow_discovered()
                    await self._clear_partial_cache()

        self._tokens = await anyio.to_thread.run_sync(ModelTokens, self._model)
        await self._server.wait_until_up()
        self._poller = asyncio.create_task(
            Supervisor(log, "health and load of the engine").run(poll), name="engine health and load"
        )

    async def aclose(self) -> None:
        """Stop the polls and the relay; requests under way fail. Idempotent."""
        if self._poller is not None:  # first: it may open a relay
            self._poller.cancel()
            await asyncio.wait([self._poller])
        if self.relay is not None:
            await self.relay.aclose()
        await self._server.http.aclose()

    # ----------------------------------------------------------------- KV events

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        """Relay the engine's KV events, if it publishes them. Raises ConfigError for a wrong endpoint."""
        settings = self._settings
        self._publishers = publishers
        if settings.kv_events_endpoint is None:
            if not self._server.discovery.sources:
                log.info("routers do not know this engine's KV cache (DYN_KV_EVENTS_ENDPOINT is not set)")
            self._open_discovered()
            return
        try:
            self.relay = EventRelay(
                publishers,
                rank_sources(
                    len(publishers),
                    settings.kv_events_endpoint,
                    settings.kv_replay_endpoint,
                    settings.kv_events_topic,
                ),
            )
        except ValueError as exc:
            raise ConfigError(f"DYN_KV_EVENTS_ENDPOINT or DYN_KV_REPLAY_ENDPOINT: {exc}") from exc
        self.relay.start()

    async def _follow_discovered(self) -> None:
        """Follow the sources that the engine reports now. Those of before are closed, and their blocks
        forgotten."""
        discovery = self._server.discovery
        if not discovery.enabled or not self._publishers or discovery.sources == self._followed:
            return
        if self.relay is not None:
            await self.relay.aclose()
            self.relay.forget("the engine publishes its KV events elsewhere now")
            self.relay = None
        self._open_discovered()

    def _open_discovered(self) -> None:
        self._followed = self._server.discovery.sources
        if not self._followed:
            return
        try:
            self.relay = EventRelay(self._publishers, self._followed)
        except ValueError as exc:
            log.warning("the KV events of the engine are not followed: %s", exc)
        else:
            self.relay.start()

    def _resize_publishers(self) -> None:
        """Set the publishers to the engine's block size. Blocks of another size are forgotten."""
        block_size = self._server.capacity.kv_block_size
        for publisher in self._publishers:
            if publisher.block_size != block_size:
                publisher.resize(block_size)

    async def clear_kv_blocks(self) -> int:
        """Make the server drop its prefix cache; return the number of blocks known so far.

        Servers do not report the number themselves. Raises HandlerFailed if the server does not do it (vLLM
        only does with `VLLM_SERVER_DEV_MODE=1`), and Draining if it does not answer.
        """
        path = _FLUSH_PATHS.get(self._server.listed.dialect)
        if path is None:
            raise HandlerFailed(
                f"an engine of kind {self._server.listed.dialect} has no way to clear its cache"
            )
        known_count = sum(publisher.block_count for publisher in self._publishers)
        try:
            status, _ = await self._server.http.ask("POST", path, _FLUSH_S)
        except PlaneError as exc:
            raise Draining(f"the engine does not answer: {exc}") from exc
        if status != 200:
            raise HandlerFailed(f"the engine answered POST {path} with HTTP {status}")
        return known_count

    async def _clear_partial_cache(self) -> None:
        """Make the server clear its cache if it holds blocks whose events were lost: it sends none again.

        A server refuses while requests hold blocks. Therefore this tries again, at most once in
        `_CLEAR_AGAIN_S`, until the server reports the clearing.
        """
        if self.relay is None or not self.relay.partial:
            self._clearing = False
            return
        now = asyncio.get_running_loop().time()
        if not self._settings.kv_events_clear or now < self._clear_again_at:
            return
        first, self._clearing = not self._clearing, True
        self._clear_again_at = now + _CLEAR_AGAIN_S
        try:
            await self.clear_kv_blocks()
        except PlaneError as exc:
            if first:
                log.warning(
                    "the engine holds blocks whose events were lost, and does not clear its cache now: %s; "
                    "routers learn these blocks from later prompts (VLLM_SERVER_DEV_MODE)",
                    exc,
                )
        else:
            if first:
                log.info("the engine was asked to clear its prefix cache, since events of it were lost")

    def endpoints(self) -> Mapping[str, AnyHandler]:
        return {}

    # ----------------------------------------------------------------- requests

    async def generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Forward the request to the server and stream its answer; a stopped request ends at once.

        Stop strings are sent to the server; the frontend finds them, too. Raises the error of `wire.refusal`
        if the server refuses the request, and Draining if it does not answer. If the server does not know the
        model, its name is read again, and the request is sent once more.
        """
        if not isinstance(request, Mapping):
            raise InvalidRequest(f"a request is an object, not {type(request).__name__}")
        prompt = prompt_ids(request)
        if request.get("chat") is not None:
            async with aclosing(self._complete_renamed(request, prompt, context)) as items:
                async for item in items:
                    yield item
            return
        refused: InvalidRequest | None = None
        if not self._prompt_as_text:
            begun = False
            try:
                async with aclosing(self._complete_renamed(request, prompt, context)) as items:
                    async for item in items:
                        begun = True
                        yield item
                return
            except InvalidRequest as exc:
                # Servers of a known kind take ids: they refused this request for another reason.
                if begun or self._settings.engine_prompt != "auto" or self._server.listed.dialect != "openai":
                    raise
                refused = exc
        if self._tokens is None:
            raise Draining("the engine is not started")
        text = self._tokens.prompt_text(prompt)
        async with aclosing(self._complete_renamed(request, text, context)) as items:
            async for item in items:
                if not self._prompt_as_text:
                    self._prompt_as_text = True
                    log.info("the engine takes no token ids (%s): prompts are sent as text", refused)
                yield item

    async def _complete_renamed(
        self, request: Mapping[str, Any], prompt: Sequence[int] | str, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Do as `_complete`, and once more if the server's name for the model has changed."""
        name, begun = self._server.listed.name, False
        try:
            async with aclosing(self._complete(request, prompt, context)) as items:
                async for item in items:
                    begun = True
                    yield item
            return
        except UnknownModel:
            if begun:  # the caller has items already
                raise
            if not await self._is_renamed(name):
                raise
        async with aclosing(self._complete(request, prompt, context)) as items:
            async for item in items:
                yield item

    async def _is_renamed(self, name: str) -> bool:
        """Return whether the server's name for the model, which was `name`, has changed."""
        try:
            return self._server.listed.name != name or (
                await self._server.identify() and self._server.listed.name != name
            )
        except ConfigError:
            return False

    async def _complete(
        self, request: Mapping[str, Any], prompt: Sequence[int] | str, context: Context
    ) -> AsyncGenerator[GenerateItem, None]:
        """Send one completion and yield its items. `prompt` is token ids or text."""
        if self._tokens is None:
            raise Draining("the engine is not started")
        reader = CompletionReader(self._tokens, hidden_stop_ids(request), token_limit(request))
        completion = self._send(request, prompt, context)
        unsubscribe = context.on_cancel(lambda _: completion.close())
        self._running_count += 1
        self._unanswered.add(completion)
        try:
            async with aclosing(completion.events()) as events:
                async for arrived in events:
                    self._unanswered.discard(completion)
                    for item in reader.items(arrived):
                        yield item
            yield reader.finish()
            if reader.aborted:
                log.warning("request %s: the engine aborted its answer half-way", context.id())
        except ContextLengthExceeded:
            self._server.expire_identity()  # its context length is not the one that it reported
            raise
        except RequestCancelled:
            yield {"token_ids": [], "finish_reason": "cancelled"}
        except (Draining, ConnectionLost):
            self._poll_now.set()
            raise
        finally:
            self._running_count -= 1
            self._unanswered.discard(completion)
            unsubscribe()
            completion.close()

    def _send(self, request: Mapping[str, Any], prompt: Sequence[int] | str, context: Context) -> Completion:
        """Send one completion. The server gets the `chat` of the request, if any, in place of the prompt."""
        dp_rank = wanted_rank(request, self.capacity.data_parallel_size)
        listed, context_length = self._server.listed, self._server.capacity.context_length
        headers = {"X-Request-Id": context.id(), **(context.trace_headers() or {})}
        if dp_rank is not None and listed.dialect == "vllm":
            headers["X-data-parallel-rank"] = str(dp_rank)
        if request.get("chat") is not None:
            body, chat = chat_completion_body(
                request, model=listed.name, dialect=listed.dialect, dp_rank=dp_rank
            )
            return self._server.http.complete(body, headers, chat)
        body = completion_body(
            request,
            model=listed.name,
            dialect=listed.dialect,
            prompt=prompt,
            dp_rank=dp_rank,
            token_room=None if context_length is None else context_length - len(prompt_ids(request)),
        )
        # The engine reports blocks with a salt by hashes that no prompt shows.
        if self.relay is not None and not isinstance(prompt, str) and not request.get("cache_salt"):
            for publisher in self._publishers:
                if dp_rank is None or publisher.dp_rank == dp_rank:
                    publisher.note_prompt(prompt)
        return self._server.http.complete(body, headers)

    # ----------------------------------------------------------------- health and load

    async def wait_health(self, healthy: bool) -> None:
        await (self._server.up if healthy else self._server.down).wait()

    def loads(self) -> Sequence[EngineLoad]:
        """Return the load of the server's metrics; without metrics, rank 0 with the requests under way
        here."""
        return self._server.loads() or [
            EngineLoad(0, self._running_count, 0, None, self.capacity.total_kv_blocks)
        ]

    def _note_down(self, refused: bool) -> None:
        """Fail the requests that the server has not begun to answer. If it `refused` a connection, its
        process has ended, and with it its cache: forget the cache."""
        if refused and self._server.up.is_set() and self.relay is not None:
            self.relay.forget("no process listens at the engine's address")
        for completion in list(self._unanswered):
            completion.close(Draining("the engine does not answer"))
