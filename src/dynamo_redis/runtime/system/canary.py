"""The canary: a request that asks an idle endpoint if it still answers.

It calls the endpoint's handler directly. So it depends on no network, takes no place from requests, and is
not counted among them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from copy import deepcopy
from typing import Any, Final

from dynamo_redis.planes.base import Handler
from dynamo_redis.planes.context import Context
from dynamo_redis.planes.stats import EndpointStats

_log = logging.getLogger(__name__)

_END_S: Final = 1.0
"""Seconds that a handler has to end after its context was killed, before it is cancelled."""


class Canary:
    """Asks one endpoint, as long as `run` runs."""

    def __init__(
        self,
        handler: Handler,
        payload: Any,
        stats: Callable[[], EndpointStats | None],
        *,
        wait_s: float,
        timeout_s: float,
    ) -> None:
        """`stats` returns the endpoint's counts, which tell if it is idle."""
        self._handler = handler
        self._payload = payload
        self._stats = stats
        self._wait_s = wait_s
        self._timeout_s = timeout_s
        self._asking: asyncio.Task[None] | None = None

    async def run(self, on_result: Callable[[str | None], None]) -> None:
        """Ask after each `wait_s` without requests. `on_result` gets None for an answer, or else the
        reason why there is none."""
        finished_count = -1
        try:
            while True:
                await asyncio.sleep(self._wait_s)
                stats = self._stats()
                if stats is None:
                    return
                if stats.in_flight_count or stats.request_count != finished_count:
                    finished_count = stats.request_count
                    continue
                on_result(await self._ask())
        finally:
            if self._asking is not None:
                self._asking.cancel()

    async def _ask(self) -> str | None:
        """Make the request. Return None, or the reason why there is no answer."""
        if self._asking is not None and not self._asking.done():
            return "an earlier canary request does not end"
        context = Context()
        self._asking = asyncio.create_task(self._first_item(context), name="canary request")
        done, _ = await asyncio.wait([self._asking], timeout=self._timeout_s)
        if not done:
            _kill(context)
            await asyncio.wait([self._asking], timeout=_END_S)
            self._asking.cancel()
            return f"the canary request had no answer within {self._timeout_s:g} s"
        if self._asking.cancelled():
            return "the canary request was cancelled by its handler"
        error = self._asking.exception()
        return None if error is None else f"the canary request failed: {type(error).__name__}: {error}"

    async def _first_item(self, context: Context) -> None:
        """Read the handler's answer to its first item, or its end."""
        request = deepcopy(self._payload)  # the handler may take it apart
        answer: Any = self._handler(request, context)
        if not hasattr(answer, "__anext__"):
            await answer
            return
        try:
            await anext(answer, None)
        finally:
            _kill(context)
            if isinstance(answer, AsyncGenerator):
                await answer.aclose()


def _kill(context: Context) -> None:
    """Kill a canary's context, and log what the handler's own callbacks raise, as for any request."""
    try:
        context.kill()
    except Exception:  # noqa: BLE001 - see above
        _log.exception("a cancellation callback of a canary request raised")
