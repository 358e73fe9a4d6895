"""Mock workers of a replay, several in one process: `python -m benchmarks.replay.worker PLAN COUNT`.

Each has a runtime, an instance, connections and a KV publisher of its own, as in processes of their own; they
share only the event loop and the interpreter. It answers {"ready": [instance id, …]}, and to commands:

    truth DIRECTORY   write the blocks of each cache, as `replay.oracle` reads it   {"events": count so far}
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from benchmarks.replay.lines import answer, commands
from benchmarks.replay.oracle import write_blocks
from benchmarks.replay.plan import CONTEXT_LENGTH, ENDPOINT, MODEL, Plan
from dynamo_redis.config import ModelSettings
from dynamo_redis.engines.mock.engine import MockEngine
from dynamo_redis.engines.worker import open_model, serve_engine
from dynamo_redis.events.kv_publisher import KvPublisher
from dynamo_redis.models.directory import ModelDirectory
from dynamo_redis.runtime import DistributedRuntime


class CountedEngine(MockEngine):
    """A mock engine that counts the KV events it has published."""

    publishers: Sequence[KvPublisher] = ()

    def follow(self, publishers: Sequence[KvPublisher]) -> None:
        self.publishers = publishers
        super().follow(publishers)

    @property
    def events_count(self) -> int:
        """KV events so far."""
        return sum(publisher.next_sequence for publisher in self.publishers)


class ReplayWorker:
    """One worker."""

    def __init__(self, plan: Plan, model: ModelDirectory) -> None:
        self.runtime = DistributedRuntime(settings=plan.settings)
        self.engine = CountedEngine(plan.engine, model)
        self._model = model
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve until `aclose`. Raises the errors of `serve_engine`."""
        ready = asyncio.Event()
        serving = serve_engine(
            self.runtime,
            self.engine,
            self._model,
            endpoint=ENDPOINT,
            model_name=MODEL,
            on_ready=lambda _: ready.set(),
        )
        self._serving = asyncio.create_task(serving)
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([self._serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._serving.done():
            await self._serving

    async def aclose(self) -> None:
        self.runtime.shutdown()
        if self._serving is not None:
            await self._serving
        await self.runtime.aclose()


async def main(plan: Plan, count: int) -> None:
    """Serve until told to end."""
    model, _ = open_model(ModelSettings.load(context_length=CONTEXT_LENGTH))
    async with AsyncExitStack() as stack:
        workers = [ReplayWorker(plan, model) for _ in range(count)]
        for worker in workers:
            stack.push_async_callback(worker.aclose)
            await worker.start()
        answer(ready=[worker.runtime.instance_id for worker in workers])
        async for word, *rest in commands():
            if word == "truth":
                for worker in workers:
                    write_blocks(Path(rest[0]), worker.runtime.instance_id, worker.engine.cache.stored())
                answer(events=sum(worker.engine.events_count for worker in workers))


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # faults cause many warnings
    uvloop.run(main(Plan.from_json(sys.argv[1]), int(sys.argv[2])))
