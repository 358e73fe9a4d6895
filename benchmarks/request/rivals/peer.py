"""The interface of a side of suite `request`, and the load that is put on it.

A side is a module of this folder with two functions: `serve(announce, *arguments)` serves until it is
cancelled, and calls `announce` with its address, once, as soon as callers may come; `connect(*arguments)`
makes the `Peer` that calls it. Imported within the rivals' environments: no third party.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any

from benchmarks.request.workloads import ITEM_BYTES, ITEMS, Kind, Workload

Announce = Callable[[str], None]

ITEM = b"x" * ITEM_BYTES


async def burst(count: int, item: Any = ITEM) -> AsyncIterator[Any]:
    """Yield items without a pause."""
    for _ in range(count):
        yield item


async def tick(count: int, item: Any = ITEM) -> AsyncIterator[Any]:
    """Yield items, one a turn of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)
        yield item


STREAMS = {"burst": burst, "tick": tick}
"""The generators that each side's server answers from, by kind."""


class WrongAnswer(Exception):
    """A side lost or shortened its payload, so it cannot be compared."""


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
        """Return the payload of an echo: bytes, or text where the side carries no bytes."""
        return b"x" * size

    async def drive(self, workload: Workload, seconds: float) -> list[float]:
        """Put the load on for `seconds`; return the seconds of each answer. Raises WrongAnswer."""
        latencies: list[float] = []
        until = time.perf_counter() + seconds
        caller = self._echoing if workload.kind == "echo" else self._streaming
        callers = [
            asyncio.create_task(caller(workload, until, latencies)) for _ in range(workload.concurrency)
        ]
        try:
            await asyncio.gather(*callers)
        finally:
            for task in callers:
                task.cancel()
            await asyncio.wait(callers)
        return latencies

    # The caller does as little as possible: its cost is the same for all sides, but not their share of it.

    async def _echoing(self, workload: Workload, until: float, latencies: list[float]) -> None:
        """Send one echo after the other."""
        clock, echo, note, size = time.perf_counter, self.echo, latencies.append, workload.size_bytes
        payload = self.payload(size)
        began = clock()
        while began < until:
            answer = await echo(payload)
            if len(answer) != size:
                raise WrongAnswer(f"{len(answer)} bytes came back instead of {size}")
            ended = clock()
            note(ended - began)
            began = ended

    async def _streaming(self, workload: Workload, until: float, latencies: list[float]) -> None:
        """Request one stream after the other."""
        clock, kind = time.perf_counter, workload.kind
        began = clock()
        while began < until:
            count = await self.stream(kind, ITEMS)
            if count != ITEMS:
                raise WrongAnswer(f"{count} items came instead of {ITEMS}")
            ended = clock()
            latencies.append(ended - began)
            began = ended
