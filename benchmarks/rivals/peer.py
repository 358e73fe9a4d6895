"""What a side of suite `request` has to offer, and the load that is put on it.

A side is a module of this folder with two functions: `serve(announce, *arguments)` serves until it is
cancelled, and calls `announce` with its address, once, as soon as callers may come; `connect(*arguments)`
makes the `Peer` that calls it. Imported within the rivals' environments: no third party.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from benchmarks.request_workloads import ITEM_BYTES, ITEMS, Kind, Workload

Announce = Callable[[str], None]

ITEM = b"x" * ITEM_BYTES


async def burst(count: int, item: Any = ITEM) -> AsyncIterator[Any]:
    """Items, without a pause."""
    for _ in range(count):
        yield item


async def tick(count: int, item: Any = ITEM) -> AsyncIterator[Any]:
    """Items, one a turn of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)
        yield item


STREAMS = {"burst": burst, "tick": tick}
"""The generators that each side's server answers from, by kind."""


class WrongAnswer(Exception):
    """A side that loses or shortens what it carries cannot be compared."""


class Peer(ABC):
    """The calling process of one side."""

    @abstractmethod
    async def echo(self, payload: Any) -> Any:
        """Send the payload and return the answer."""

    @abstractmethod
    async def stream(self, kind: Kind, count: int) -> int:
        """Ask for `count` items, read them one by one, and return how many there were."""

    async def aclose(self) -> None:  # noqa: B027 - most sides just end with their process
        """Close what is open."""

    def payload(self, size: int) -> Any:
        """What is echoed: bytes, or text where the side carries no bytes."""
        return b"x" * size

    async def drive(self, workload: Workload, seconds: float) -> list[float]:
        """Put the load on for so long; the seconds that each answer took. Raises WrongAnswer."""
        ask = self._request(workload)
        latencies: list[float] = []
        clock = time.perf_counter
        until = clock() + seconds

        async def caller() -> None:
            while (began := clock()) < until:
                await ask()
                latencies.append(clock() - began)

        callers = [asyncio.create_task(caller()) for _ in range(workload.concurrency)]
        try:
            await asyncio.gather(*callers)
        finally:
            for task in callers:
                task.cancel()
            await asyncio.wait(callers)
        return latencies

    def _request(self, workload: Workload) -> Callable[[], Awaitable[None]]:
        """One request of the workload, checked."""
        if workload.kind == "echo":
            return partial(self._echoed, self.payload(workload.size_bytes), workload.size_bytes)
        return partial(self._streamed, workload.kind)

    async def _echoed(self, payload: Any, size: int) -> None:
        answer = await self.echo(payload)
        if len(answer) != size:
            raise WrongAnswer(f"{len(answer)} bytes came back of {size}")

    async def _streamed(self, kind: Kind) -> None:
        count = await self.stream(kind, ITEMS)
        if count != ITEMS:
            raise WrongAnswer(f"{count} items came of {ITEMS}")
