"""An OpenAI-compatible server as its worker sees it: whether it is well, what it is, what it has to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from dynamo_redis.config import OpenAIEngineSettings
from dynamo_redis.engines.base import EngineCapacity, EngineLoad
from dynamo_redis.engines.openai.http import EngineHttp
from dynamo_redis.engines.openai.metrics import EngineMetrics, read_metrics
from dynamo_redis.engines.openai.models import (
    DETAILS_PATHS,
    ListedModel,
    ServerDetails,
    read_details,
    read_models,
)
from dynamo_redis.engines.openai.request import Dialect
from dynamo_redis.errors import CannotConnect, ConfigError, PlaneError

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE: Final = 16
DEFAULT_TOTAL_KV_BLOCKS: Final = 16384

_SILENCES: Final = 3
"""Looks at the server's health without an answer, in a row, until it counts as down. One refused connection
is enough: no process listens there."""

_ASK_AGAIN_S: Final = 10.0
"""Pause between two questions to a healthy server whether it is still the same."""


class EngineServer:
    """One address at which a server is, and perhaps another one tomorrow. It owns no task: `look` is to be
    called as often as its health and load are to be known."""

    def __init__(
        self,
        settings: OpenAIEngineSettings,
        *,
        context_length: int | None,
        on_down: Callable[[bool], None],
        on_introduced: Callable[[], None],
    ) -> None:
        """`on_down` is told when the server counts as down, each time that it is looked for in vain; and
        whether no process listens there. `on_introduced` is told when it has said what it is.

        Raises ConfigError.
        """
        secret = settings.engine_api_key
        api_key = None if secret is None else secret.get_secret_value()
        try:
            url = settings.engine_url.get_secret_value()
            self.http = EngineHttp(url, api_key, settings.engine_connect_timeout_s)
        except ValueError as exc:
            raise ConfigError(f"DYN_ENGINE_URL: {exc}") from exc
        self.listed = ListedModel(settings.engine_model or "", "openai")
        """The model that it serves, as it says."""
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self.down.set()
        self.silence = ""
        """Why it is not up, as said last."""
        self._settings = settings
        self._context_limit = context_length
        self._on_down = on_down
        self._on_introduced = on_introduced
        self._details = ServerDetails()
        self._metrics = EngineMetrics({})
        self._metrics_path: str | None = "/metrics"
        self._health_path = settings.engine_health_path or "/health"
        self._metrics_failure = ""
        self._metrics_failure_count = 0
        self._known = False  # whether it has said what it is since it was away last
        self._ask_at = 0.0  # the loop's time at which it is asked again
        self._ever_known = False
        self._introducing = asyncio.Lock()
        self._asked_count = 0
        self._told = False
        self._silent_count = 0

    @property
    def capacity(self) -> EngineCapacity:
        settings, metrics = self._settings, self._metrics
        told_size = metrics.block_size or self._details.block_size
        block_size = settings.engine_block_size or told_size or DEFAULT_BLOCK_SIZE
        block_count = settings.engine_total_kv_blocks or metrics.block_count
        if block_count is None and metrics.token_count:
            block_count = metrics.token_count // block_size
        lengths = (self._context_limit, self.listed.context_length or self._details.context_length)
        return EngineCapacity(
            total_kv_blocks=block_count or DEFAULT_TOTAL_KV_BLOCKS,
            kv_block_size=block_size,
            max_num_seqs=settings.engine_max_num_seqs,
            max_num_batched_tokens=settings.engine_max_num_batched_tokens,
            data_parallel_size=settings.engine_data_parallel_size,
            context_length=min((length for length in lengths if length), default=None),
        )

    # ----------------------------------------------------------------- whether it is well

    async def wait_until_up(self) -> None:
        """Wait for the server to answer and to list its model, within `DYN_ENGINE_START_TIMEOUT_S`.

        Raises ConfigError.
        """
        settings = self._settings
        try:
            async with asyncio.timeout(settings.engine_start_timeout_s):
                while not await self.look():  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(settings.engine_poll_interval_s)
        except TimeoutError:
            raise ConfigError(
                f"DYN_ENGINE_URL={self.http.url}: the engine {self.silence or 'does not answer'}, after "
                f"{settings.engine_start_timeout_s:g} s (DYN_ENGINE_START_TIMEOUT_S)"
            ) from None

    async def look(self) -> bool:
        """Whether the server is well, and is known: one that was away, or comes up, is asked what it is. One
        that is well and known stays so while it does not say it again."""
        refused, told = False, True
        try:
            status = await self._health_status()
            well = status == 200
            if not well:
                self._say_silence(f"answered {self._health_path} with HTTP {status}")
            elif not self._known or asyncio.get_running_loop().time() >= self._ask_at:
                try:
                    told = await self.introduce()
                    well = told or self._known
                except ConfigError as exc:
                    if not self._ever_known:
                        raise
                    well = False
                    self._say_silence(f"cannot be used: {exc}")
        except PlaneError as exc:
            well = False
            refused = isinstance(exc, CannotConnect)
            self._say_silence("does not answer")
            log.debug("the engine at %s: %s", self.http.url, exc)
        if well:
            self._silent_count = 0
            if told:
                self.silence = ""
            self.up.set()
            self.down.clear()
            return True
        self._known = False
        self._silent_count = _SILENCES if refused else self._silent_count + 1
        if self._silent_count >= _SILENCES:
            self._on_down(refused)
            self.down.set()
            self.up.clear()
        return False

    async def _health_status(self) -> int:
        timeout_s = self._settings.engine_poll_timeout_s
        status, _ = await self.http.ask("GET", self._health_path, timeout_s)
        if status in (404, 405) and self._health_path == "/health":
            self._health_path = "/v1/models"
            status, _ = await self.http.ask("GET", self._health_path, timeout_s)
        return status

    # ----------------------------------------------------------------- what it is

    def forget(self) -> None:
        """The server seems to be another one than it said: it is asked at the next look."""
        self._ask_at = 0.0

    async def introduce(self) -> bool:
        """Ask whose server it is, its name for the model, and how large it is. False if it does not say now.
        Those who want to know at the same time share one answer.

        Raises ConfigError if it has no such model as it is to have.
        """
        asked_count = self._asked_count
        async with self._introducing:
            if self._asked_count == asked_count:
                self._asked_count += 1
                self._told = False
                self._told = await self._ask_identity()
            return self._told

    async def _ask_identity(self) -> bool:
        settings = self._settings
        try:
            status, content = await self.http.ask("GET", "/v1/models", settings.engine_poll_timeout_s)
        except PlaneError as exc:
            self._say_silence(f"cannot list its models ({exc})")
            return False
        if status >= 500 and status != 501:
            self._say_silence(f"cannot list its models (HTTP {status})")
            return False
        listed = read_models(content) if status == 200 else []
        wanted = settings.engine_model
        if not listed and wanted is None:
            self._say_silence(f"lists no models (HTTP {status}; DYN_ENGINE_MODEL names one)")
            return False
        found = next((model for model in listed if wanted in (None, model.name)), None)
        if listed and found is None:
            names = ", ".join(model.name for model in listed)
            raise ConfigError(f"DYN_ENGINE_MODEL={wanted}: {self.http.url} has {names}")
        found = found or ListedModel(wanted or "", "openai")
        if settings.engine_kind != "auto":
            found = replace(found, dialect=settings.engine_kind)
        details = await self._ask_details(found.dialect)
        is_same = self._known and found == self.listed
        if not is_same:
            self._metrics_path = "/metrics"
        await self.look_at_metrics(is_same=is_same)
        self._take_identity(found, details)
        return True

    async def _ask_details(self, dialect: Dialect) -> ServerDetails:
        path = DETAILS_PATHS.get(dialect)
        if path is None:
            return ServerDetails()
        try:
            status, content = await self.http.ask("GET", path, self._settings.engine_poll_timeout_s)
        except PlaneError as exc:
            log.debug("the engine at %s: %s", self.http.url, exc)
            return self._details
        return read_details(content) if status == 200 else ServerDetails()

    def _take_identity(self, found: ListedModel, details: ServerDetails) -> None:
        known, before = (self.listed, self._details), self._describe()
        self.listed, self._details = found, details
        if not self._known or known != (found, details):
            changed = self._ever_known and before != self._describe()
            log.log(
                logging.WARNING if changed else logging.INFO,
                "the engine at %s is %s%s",
                self.http.url,
                self._describe(),
                f"; it was {before}" if changed else "",
            )
        self._ask_at = asyncio.get_running_loop().time() + _ASK_AGAIN_S
        if not self._known:
            self._warn_of_settings()
        self._known = self._ever_known = True
        self._on_introduced()

    def _warn_of_settings(self) -> None:
        """Say where a setting contradicts what the server says of itself."""
        limit, told = self._context_limit, self.listed.context_length or self._details.context_length
        if limit is not None and told is not None and limit > told:
            log.warning("DYN_CONTEXT_LENGTH=%d: the engine's context of %d tokens counts", limit, told)
        size = self._settings.engine_block_size
        told = self._metrics.block_size or self._details.block_size
        if size is not None and told is not None and size != told:
            log.warning(
                "DYN_ENGINE_BLOCK_SIZE=%d: the engine says that its blocks have %d tokens; "
                "if they do, routers do not hear of them",
                size,
                told,
            )

    def _describe(self) -> str:
        capacity = self.capacity
        context = capacity.context_length or "unknown"
        return (
            f"{self.listed.dialect}, model {self.listed.name}, context {context}, "
            f"blocks of {capacity.kv_block_size} tokens"
        )

    def _say_silence(self, why: str) -> None:
        """Say once what the engine does not say or do."""
        if why != self.silence:
            self.silence = why
            if self._known:
                log.info("the engine at %s %s: what it said before counts", self.http.url, why)
            else:
                log.info("waiting for the engine at %s: it %s", self.http.url, why)

    # ----------------------------------------------------------------- what it has to do

    def loads(self) -> list[EngineLoad]:
        """The load of each rank by the server's metrics; empty where it has none."""
        total_blocks = self.capacity.total_kv_blocks
        return [
            EngineLoad(
                dp_rank=dp_rank,
                running_count=rank.running_count,
                waiting_count=rank.waiting_count,
                active_blocks=None if rank.used_ratio is None else round(rank.used_ratio * total_blocks),
                total_blocks=total_blocks,
                prefix_hit_rate=rank.prefix_hit_rate,
            )
            for dp_rank, rank in sorted(self._metrics.ranks.items())
            if dp_rank < self._settings.engine_data_parallel_size
        ]

    async def look_at_metrics(self, *, is_same: bool = True) -> None:
        """Read its load, if it has `/metrics`. One that does not answer leaves what was read before; after
        `_SILENCES` times in a row the load is not known. A page without its sizes leaves those, if the
        engine `is_same`."""
        if self._metrics_path is None:
            return
        try:
            status, content = await self.http.ask(
                "GET", self._metrics_path, self._settings.engine_poll_timeout_s
            )
        except PlaneError as exc:
            self._say_metrics_failure(str(exc))
            return
        if status == 200:
            self._metrics_failure, self._metrics_failure_count = "", 0
            self._take_metrics(read_metrics(content.decode("utf-8", "replace")), is_same)
        elif status in (404, 405, 501):
            log.info("the engine at %s has no %s: its load is not known", self.http.url, self._metrics_path)
            self._metrics_path = None
            self._take_metrics(EngineMetrics({}), is_same)
        else:
            self._say_metrics_failure(f"it answered HTTP {status}")

    def _take_metrics(self, metrics: EngineMetrics, is_same: bool) -> None:
        self._metrics = metrics.after(self._metrics) if is_same else metrics

    def _say_metrics_failure(self, why: str) -> None:
        """Say once, until it is read again, why its load is not; what was read last is soon too old."""
        self._metrics_failure_count += 1
        if self._metrics_failure_count >= _SILENCES:
            self._metrics = replace(self._metrics, ranks={})
        if not self._metrics_failure:
            log.warning("the load of the engine at %s is not known now: %s", self.http.url, why)
        self._metrics_failure = why
