"""A runtime API, Dynamo's own or ours: the same lines on both, over any number of worker processes.

The first argument is the runtime's module, `dynamo.runtime` or `dynamo_redis.runtime`. Discovery and planes
are as the environment says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

from benchmarks.request.rivals.peer import STREAMS, Announce, Peer
from benchmarks.request.workloads import ITEM_BYTES, KINDS, Kind

ITEM = "x" * ITEM_BYTES


def endpoint(runtime: Any, kind: Kind) -> Any:
    """Return the endpoint of a kind."""
    return runtime.endpoint(f"bench.request.{kind}")


async def _echo(request: Any) -> AsyncIterator[Any]:
    yield request


def _streaming(kind: Kind) -> Any:
    items = STREAMS[kind]

    async def handler(request: Any) -> AsyncIterator[Any]:
        async for item in items(request, ITEM):
            yield item

    return handler


async def serve(announce: Announce, module: str) -> None:
    """Run as one worker, with each kind as an endpoint."""

    @import_module(module).dynamo_worker()  # type: ignore[untyped-decorator]
    async def worker(runtime: Any) -> None:
        announce(module)
        await asyncio.gather(
            *(
                endpoint(runtime, kind).serve_endpoint(_echo if kind == "echo" else _streaming(kind))
                for kind in KINDS
            )
        )

    await worker()


class RuntimePeer(Peer):
    """One client for each kind, all of one runtime."""

    def __init__(self, clients: dict[Kind, Any], running: asyncio.Task[None] | None) -> None:
        """`running` is the task that holds the runtime."""
        self._clients = clients
        self._running = running

    def payload(self, size: int) -> str:
        return "x" * size

    async def echo(self, payload: str) -> Any:
        answer = ""
        async for item in await self._clients["echo"].round_robin(payload, annotated=False):
            answer = item
        return answer

    async def stream(self, kind: Kind, count: int) -> int:
        seen = 0
        async for _ in await self._clients[kind].round_robin(count, annotated=False):
            seen += 1
        return seen


async def connect(module: str, workers: str) -> RuntimePeer:
    """Wait until `workers` workers serve everything."""
    connected: asyncio.Future[RuntimePeer] = asyncio.get_running_loop().create_future()

    @import_module(module).dynamo_worker()  # type: ignore[untyped-decorator]
    async def client(runtime: Any) -> None:
        clients = {kind: await endpoint(runtime, kind).client() for kind in KINDS}
        while any(len(found.instance_ids()) < int(workers) for found in clients.values()):
            await asyncio.sleep(0.05)
        connected.set_result(RuntimePeer(clients, asyncio.current_task()))
        await asyncio.Event().wait()

    running = asyncio.ensure_future(client())
    await asyncio.wait((running, connected), return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    return await connected
