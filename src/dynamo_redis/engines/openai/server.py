"""The health, identity and load of an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from dynamo_redis.config import OpenAIEngineSettings
from dynamo_redis.engines.base import EngineCapacity, EngineLoad
from dynamo_redis.engines.openai.dialects import Dialect
from dynamo_redis.engines.openai.discovery import EventDiscovery
from dynamo_redis.engines.openai.http import EngineHttp
from dynamo_redis.engines.openai.metrics import EngineMetrics, read_metrics
from dynamo_redis.engines.openai.models import (
    DETAILS_PATHS,
    ListedModel,
    ServerDetails,
    read_details,
    read_models,
)
from dynamo_redis.errors import CannotConnect, ConfigError, PlaneError

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE: Final = 16
DEFAULT_TOTAL_KV_BLOCKS: Final = 16384

_MISSED_CHECKS: Final = 3
"""Health checks without an answer, in a row, after which the server is down. A refused connection is enough
by itself: no process listens there."""

_IDENTIFY_AGAIN_S: Final = 10.0
"""Seconds after which a healthy server is identified again."""


class EngineServer:
    """The server at one address, which may be replaced by another one at any time.

    It owns no task: its user calls `check` and `poll_metrics` periodically.
    """

    def __init__(
        self,
        settings: OpenAIEngineSettings,
        *,
        context_length: int | None,
        on_down: Callable[[bool], None],
        on_identified: Callable[[], None],
    ) -> None:
        """Prepare for one server. Raises ConfigError for an invalid URL.

        Args:
            settings: the worker's settings of its engine.
            context_length: an upper limit for the context length that the server reports.
            on_down: called after each failed check while the server is down; its argument is True if no
                process listens there.
            on_identified: called when the server's identity and sizes were read.
        """
        secret = settings.engine_api_key
        api_key = None if secret is None else secret.get_secret_value()
        try:
            url = settings.engine_url.get_secret_value()
            self.http = EngineHttp(url, api_key, settings.engine_connect_timeout_s)
        except ValueError as exc:
            raise ConfigError(f"DYN_ENGINE_URL: {exc}") from exc
        self.listed = ListedModel(settings.engine_model or "", "openai")
        """The model that the server serves, as it reports it."""
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self.down.set()
        self.problem = ""
        """The last reason why the server is not up."""
        self.discovery = EventDiscovery(settings, self.http)
        self._rank_count = settings.engine_data_parallel_size
        self._settings = settings
        self._context_limit = context_length
        self._on_down = on_down
        self._on_identified = on_identified
        self._details = ServerDetails()
        self._metrics = EngineMetrics({})
        self._metrics_path: str | None = "/metrics"
        self._health_path = settings.engine_health_path or "/health"
        self._metrics_failure = ""
        self._metrics_failure_count = 0
        self._known = False  # identified since it was last away
        self._identify_at = 0.0  # the loop's time at which it is identified again
        self._ever_known = False
        self._identifying = asyncio.Lock()
        self._identify_count = 0
        self._identified = False
        self._silent_count = 0

    @property
    def capacity(self) -> EngineCapacity:
        settings, metrics = self._settings, self._metrics
        reported_size = metrics.block_size or self._details.block_size
        block_size = settings.engine_block_size or reported_size or DEFAULT_BLOCK_SIZE
        block_count = settings.engine_total_kv_blocks or metrics.block_count
        if block_count is None and metrics.token_count:
            block_count = metrics.token_count // block_size
        lengths = (self._context_limit, self.listed.context_length or self._details.context_length)
        return EngineCapacity(
            total_kv_blocks=block_count or DEFAULT_TOTAL_KV_BLOCKS,
            kv_block_size=block_size,
            max_num_seqs=settings.engine_max_num_seqs,
            max_num_batched_tokens=settings.engine_max_num_batched_tokens,
            data_parallel_size=self._rank_count or 1,
            context_length=min((length for length in lengths if length), default=None),
        )

    # ----------------------------------------------------------------- health

    async def wait_until_up(self) -> None:
        """Wait until the server answers and lists its model. Raises ConfigError.

        The time limit is `DYN_ENGINE_START_TIMEOUT_S`.
        """
        settings = self._settings
        try:
            async with asyncio.timeout(settings.engine_start_timeout_s):
                while not await self.check():  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(settings.engine_poll_interval_s)
        except TimeoutError:
            raise ConfigError(
                f"DYN_ENGINE_URL={self.http.url}: the engine {self.problem or 'does not answer'}, after "
                f"{settings.engine_start_timeout_s:g} s (DYN_ENGINE_START_TIMEOUT_S)"
            ) from None

    async def check(self) -> bool:
        """Check the server's health and return whether it is up: healthy and identified.

        A server that comes up, for the first time or again, is identified first. A healthy server stays up if
        a later identification gets no answer.
        """
        refused, identified = False, True
        try:
            timeout_s = self._settings.engine_poll_timeout_s
            status, _ = await self.http.ask("GET", self._health_path, timeout_s)
            if status in (404, 405) and self._health_path == "/health":  # the server has no such path
                self._health_path = "/v1/models"
                status, _ = await self.http.ask("GET", self._health_path, timeout_s)
            well = status == 200
            if not well:
                self._log_problem(f"answered {self._health_path} with HTTP {status}")
            elif not self._known or asyncio.get_running_loop().time() >= self._identify_at:
                try:
                    identified = await self.identify()
                    well = identified or self._known
                except ConfigError as exc:
                    if not self._ever_known:
                        raise
                    well = False
                    self._log_problem(f"cannot be used: {exc}")
        except PlaneError as exc:
            well = False
            refused = isinstance(exc, CannotConnect)
            self._log_problem("does not answer")
            log.debug("the engine at %s: %s", self.http.url, exc)
        if well:
            self._silent_count = 0
            if identified:
                self.problem = ""
            self.up.set()
            self.down.clear()
            return True
        self._known = False
        self._silent_count = _MISSED_CHECKS if refused else self._silent_count + 1
        if self._silent_count >= _MISSED_CHECKS:
            self._on_down(refused)
            self.down.set()
            self.up.clear()
        return False

    # ----------------------------------------------------------------- identity

    def expire_identity(self) -> None:
        """Identify the server again at the next check."""
        self._identify_at = 0.0

    async def identify(self) -> bool:
        """Read the kind of server, its name for the model, and its sizes; return False if it reports none
        now.

        Concurrent calls share one answer. Raises ConfigError if the server does not have `DYN_ENGINE_MODEL`.
        """
        identify_count = self._identify_count
        async with self._identifying:
            if self._identify_count == identify_count:
                self._identify_count += 1
                self._identified = False
                self._identified = await self._ask_identity()
            return self._identified

    async def _ask_identity(self) -> bool:
        """Do the requests of `identify`."""
        settings = self._settings
        try:
            status, content = await self.http.ask("GET", "/v1/models", settings.engine_poll_timeout_s)
        except PlaneError as exc:
            self._log_problem(f"cannot list its models ({exc})")
            return False
        if status >= 500 and status != 501:
            self._log_problem(f"cannot list its models (HTTP {status})")
            return False
        listed = read_models(content) if status == 200 else []
        wanted = settings.engine_model
        if not listed and wanted is None:
            self._log_problem(f"lists no models (HTTP {status}; DYN_ENGINE_MODEL names one)")
            return False
        found = next((model for model in listed if wanted in (None, model.name)), None)
        if listed and found is None:
            names = ", ".join(model.name for model in listed)
            raise ConfigError(f"DYN_ENGINE_MODEL={wanted}: {self.http.url} has {names}")
        found = found or ListedModel(wanted or "", "openai")
        if settings.engine_kind != "auto":
            found = replace(found, dialect=settings.engine_kind)
        details, answer = await self._ask_details(found.dialect)
        await self.discovery.ask(found.dialect, answer)
        is_same = self._known and found == self.listed
        if not is_same:
            self._metrics_path = "/metrics"
        await self.poll_metrics(is_same=is_same)
        self._set_identity(found, details)
        return True

    async def _ask_details(self, dialect: Dialect) -> tuple[ServerDetails, bytes | None]:
        """Return the sizes of `DETAILS_PATHS` and the answer that has them, empty without such a path.

        If the server does not answer now: the last sizes, and None.
        """
        for path in DETAILS_PATHS.get(dialect, ()):
            try:
                status, content = await self.http.ask("GET", path, self._settings.engine_poll_timeout_s)
            except PlaneError as exc:
                log.debug("the engine at %s: %s", self.http.url, exc)
                return self._details, None
            if status == 200:
                return read_details(content), content
        return ServerDetails(), b""

    def _fix_rank_count(self) -> None:
        """Take the number of ranks that the engine reports, once: the worker has published it since."""
        reported_count = len(self.discovery.sources)
        if self._rank_count is None:
            self._rank_count = reported_count or 1
        elif reported_count not in (0, self._rank_count) and not self._known:
            log.warning(
                "the engine reports KV events of %d ranks; this worker serves %d: restart it to serve "
                "as many (DYN_ENGINE_DATA_PARALLEL_SIZE)",
                reported_count,
                self._rank_count,
            )

    def _set_identity(self, found: ListedModel, details: ServerDetails) -> None:
        """Store the identity, log a change of it, and warn of settings that contradict it."""
        self._fix_rank_count()
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
        self._identify_at = asyncio.get_running_loop().time() + _IDENTIFY_AGAIN_S
        if not self._known:
            limit, length = self._context_limit, self.listed.context_length or self._details.context_length
            if limit is not None and length is not None and limit > length:
                log.warning(
                    "DYN_CONTEXT_LENGTH=%d: the engine's context has only %d tokens, which is the limit",
                    limit,
                    length,
                )
            block_size = self._settings.engine_block_size
            reported_size = self._metrics.block_size or self._details.block_size
            if block_size is not None and reported_size is not None and block_size != reported_size:
                log.warning(
                    "DYN_ENGINE_BLOCK_SIZE=%d: the engine reports blocks of %d tokens; "
                    "if it is right, routers do not learn of its blocks",
                    block_size,
                    reported_size,
                )
        self._known = self._ever_known = True
        self._on_identified()

    def _describe(self) -> str:
        capacity = self.capacity
        context = capacity.context_length or "unknown"
        return (
            f"{self.listed.dialect}, model {self.listed.name}, context {context}, "
            f"blocks of {capacity.kv_block_size} tokens"
        )

    def _log_problem(self, why: str) -> None:
        """Log a problem once, until it changes or ends."""
        if why != self.problem:
            self.problem = why
            if self._known:
                log.info("the engine at %s %s: its last known identity stays", self.http.url, why)
            else:
                log.info("waiting for the engine at %s: it %s", self.http.url, why)

    # ----------------------------------------------------------------- load

    def loads(self) -> list[EngineLoad]:
        """Return the load of each rank by the server's metrics; empty without metrics."""
        total_blocks = self.capacity.total_kv_blocks or DEFAULT_TOTAL_KV_BLOCKS
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
            if dp_rank < (self._rank_count or 1)
        ]

    async def poll_metrics(self, *, is_same: bool = True) -> None:
        """Read the server's load and sizes, if it has `/metrics`.

        If it does not answer, the last load stays; after `_MISSED_CHECKS` failures in a row the load is
        unknown. Sizes that a page does not have stay, if the engine `is_same`.
        """
        if self._metrics_path is None:
            return
        try:
            status, content = await self.http.ask(
                "GET", self._metrics_path, self._settings.engine_poll_timeout_s
            )
        except PlaneError as exc:
            self._log_metrics_failure(str(exc))
            return
        if status == 200:
            self._metrics_failure, self._metrics_failure_count = "", 0
            self._set_metrics(read_metrics(content.decode("utf-8", "replace")), is_same)
        elif status in (404, 405, 501):
            log.info("the engine at %s has no %s: its load is not known", self.http.url, self._metrics_path)
            self._metrics_path = None
            self._set_metrics(EngineMetrics({}), is_same)
        else:
            self._log_metrics_failure(f"it answered HTTP {status}")

    def _set_metrics(self, metrics: EngineMetrics, is_same: bool) -> None:
        self._metrics = metrics.with_sizes_of(self._metrics) if is_same else metrics

    def _log_metrics_failure(self, why: str) -> None:
        """Log once why the load cannot be read; after several failures in a row forget the last load."""
        self._metrics_failure_count += 1
        if self._metrics_failure_count >= _MISSED_CHECKS:
            self._metrics = replace(self._metrics, ranks={})
        if not self._metrics_failure:
            log.warning("the load of the engine at %s is not known now: %s", self.http.url, why)
        self._metrics_failure = why
