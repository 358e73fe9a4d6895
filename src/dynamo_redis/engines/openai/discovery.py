"""The search for an engine's KV events: the engine is asked where it publishes them."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Final
from urllib.parse import urlsplit

from dynamo_redis.config import OpenAIEngineSettings
from dynamo_redis.engines.openai.dialects import Dialect
from dynamo_redis.engines.openai.event_sources import Hosts, read_sglang_sources, read_vllm_sources
from dynamo_redis.engines.openai.http import EngineHttp
from dynamo_redis.errors import ConnectionLost, PlaneError
from dynamo_redis.events.engine_zmq.wire import EventSource

log = logging.getLogger(__name__)

VLLM_PATH: Final = "/kv_event_sources"
_BY_FLAGS: Final = "routers learn its KV cache only with DYN_KV_EVENTS_ENDPOINT (--kv-events-endpoint)"
_ABSENT: Final = (404, 405, 501)


class EventDiscovery:
    """The KV-event sources of the engine at one address, as it last reported them.

    It owns no task. Its user calls `ask` whenever the engine is identified, so that an engine that comes back
    with other settings is asked again.
    """

    def __init__(self, settings: OpenAIEngineSettings, http: EngineHttp) -> None:
        self.sources: tuple[EventSource, ...] = ()
        """One for each data-parallel rank, in order; empty if none are known."""
        self.enabled = (
            settings.kv_events_endpoint is None
            and settings.kv_events_discovery != "off"
            and settings.engine_prompt != "text"  # no event fits a prompt that the engine tokenizes
        )
        self._allow_all = settings.kv_events_discovery == "any"
        self._timeout_s = settings.engine_poll_timeout_s
        self._host = urlsplit(settings.engine_url.get_secret_value()).hostname or ""
        self._http = http
        self._said = ""

    async def ask(self, dialect: Dialect, server_info: bytes | None) -> None:
        """Update `sources`.

        An engine that does not answer in time keeps its sources. A refused answer leaves none.

        Args:
            dialect: the kind of engine.
            server_info: SGLang's answer; empty if it has none, None if it does not answer now.
        """
        if not self.enabled or dialect not in ("vllm", "sglang"):
            self.sources = ()
            return
        try:
            content = await self._vllm_answer() if dialect == "vllm" else server_info
        except PlaneError as exc:
            log.debug("the engine at %s does not say where its KV events are now: %s", self._http.url, exc)
            return
        if content is None:
            return
        if not content:
            self._set((), f"does not say where it publishes KV events: {_BY_FLAGS}")
            return
        read = read_vllm_sources if dialect == "vllm" else read_sglang_sources
        try:
            sources = tuple(read(content, await self._hosts()))
        except ValueError as exc:
            self._set((), f"gave an answer about its KV events that is refused: {exc}. {_BY_FLAGS}", bad=True)
            return
        if not sources:
            self._set((), "publishes no KV events (its --kv-events-config)")
            return
        first = sources[0]
        replay = f", replay at {first.replay_endpoint}" if first.replay_endpoint else ", without replay"
        count = f"{len(sources)} rank{'s' if len(sources) > 1 else ''}"
        self._set(sources, f"publishes the KV events of {count}, the first at {first.endpoint}{replay}")

    async def _vllm_answer(self) -> bytes:
        """Return the answer, empty if this version has none. Raises PlaneError if there is none now."""
        status, content = await self._http.ask("GET", VLLM_PATH, self._timeout_s)
        if status == 200:
            return content
        if status in _ABSENT:
            return b""
        raise ConnectionLost(f"it answered {VLLM_PATH} with HTTP {status}")

    async def _hosts(self) -> Hosts:
        """Return the engine's host with its addresses of now; without them if the name is not resolved in
        time."""
        addresses: set[str] = set()
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.get_running_loop().getaddrinfo(
                    self._host, None, type=socket.SOCK_STREAM
                )
            addresses = {str(address[0]) for *_, address in found}
        except (OSError, TimeoutError) as exc:
            log.debug("the addresses of %s are not known: %r", self._host, exc)
        return Hosts(self._host, addresses, allow_all=self._allow_all)

    def _set(self, sources: tuple[EventSource, ...], found: str, *, bad: bool = False) -> None:
        """Store the sources, and log once what was found, until it changes."""
        if found != self._said:
            self._said = found
            level = logging.WARNING if bad else logging.INFO
            log.log(level, "the engine at %s %s", self._http.url, found)
        self.sources = sources
