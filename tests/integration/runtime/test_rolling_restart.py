"""Worker processes end under full load, and no caller sees an error."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_redis.errors import ConnectionLost, Draining
from dynamo_redis.planes.tcp.client import TcpClient
from dynamo_redis.runtime import Client, DistributedRuntime

from .leaving_worker import generate

OpenRuntime = Callable[..., Awaitable[DistributedRuntime]]
StartWorker = Callable[..., Awaitable[Process]]

ENDPOINT = "dynamo.backend.generate"
MIB = 1 << 20
LOADS: dict[str, Any] = {
    "unary": {"count": 1, "pause_s": 0},
    "burst": {"count": 200, "pause_s": 0},
    "stream": {"count": 20, "pause_s": 0.01},
}


@pytest.fixture
async def start_worker(dynamo_redis_url: str, dynamo_redis_prefix: str) -> AsyncIterator[StartWorker]:
    """Start a worker process that runs few requests at once, so that others wait, with a minute to drain."""
    started: list[Process] = []
    environment = os.environ | {
        "DYN_REDIS_URL": dynamo_redis_url,
        "DYN_REDIS_PREFIX": dynamo_redis_prefix,
        "DYN_TCP_MAX_IN_FLIGHT": "12",
        "DYN_GRACEFUL_SHUTDOWN_S": "60",
    }

    async def start(**overrides: str) -> Process:
        program = str(Path(__file__).with_name("leaving_worker.py"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, program, ENDPOINT, env=environment | overrides, stdout=PIPE
        )
        started.append(process)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"serving\n"
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def client_of(runtime: DistributedRuntime, count: int) -> Client:
    client = await runtime.endpoint(ENDPOINT).client()
    async with asyncio.timeout(30):
        while len(client.instance_ids()) < count:
            await asyncio.sleep(0.01)
    return client


async def exhaust(items: AsyncIterator[Any]) -> None:
    async for _ in items:
        pass


class Load:
    """Callers at full speed that check every answer."""

    def __init__(self, client: Client) -> None:
        self.done: Counter[str] = Counter()
        self._client = client
        self._stopping = False

    async def run(self, kind: str) -> None:
        request = LOADS[kind]
        while not self._stopping:
            choose = self._client.p2c if self.done[kind] % 2 else self._client.round_robin
            items = [item async for item in await choose(request, annotated=False)]
            pid = items[0][0]
            assert items == [[pid, number] for number in range(request["count"])]
            self.done[kind] += 1

    async def goes_on(self) -> None:
        """Wait until some requests of each kind are answered."""
        before = self.done.copy()
        async with asyncio.timeout(20):
            while any(self.done[kind] == before[kind] for kind in LOADS):
                await asyncio.sleep(0.01)

    def stop(self) -> None:
        self._stopping = True


async def test_rolling_restart_fails_no_call(open_runtime: OpenRuntime, start_worker: StartWorker) -> None:
    workers = await asyncio.gather(*(start_worker() for _ in range(3)))
    caller = await open_runtime()
    client = await client_of(caller, 3)
    load = Load(client)
    async with asyncio.TaskGroup() as callers:
        for kind, count in (("unary", 32), ("burst", 4), ("stream", 16)):
            for _ in range(count):
                callers.create_task(load.run(kind))
        for leaving in workers:
            await load.goes_on()
            coming = await open_runtime()
            await coming.endpoint(ENDPOINT).start_serving(generate)
            leaving.terminate()
            async with asyncio.timeout(20):
                assert await leaving.wait() == 0
        await load.goes_on()
        load.stop()
    plane_client = caller._plane_client
    assert isinstance(plane_client, TcpClient)
    assert plane_client.pending_count == 0
    assert [(member.in_flight, len(member.pending)) for member in client._view] == [(0, 0)] * 3


async def test_slow_reader_gets_the_whole_last_answer(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    """Otherwise the bytes that the caller has not read yet would be lost with the worker's process."""
    worker = await start_worker()
    client = await client_of(await open_runtime(), 1)
    await exhaust(await client.round_robin(LOADS["unary"], annotated=False))  # a connection is there
    call = await client.round_robin({"size_bytes": 30 * MIB}, annotated=False)
    reading = asyncio.ensure_future(anext(call))
    await asyncio.sleep(0.02)
    time.sleep(0.5)  # the handler ends meanwhile, and nothing is read
    worker.terminate()
    time.sleep(0.4)  # and the worker ends
    assert len(await reading) == 30 * MIB
    assert [item async for item in call] == []
    async with asyncio.timeout(30):
        assert await worker.wait() == 0


async def test_second_signal_ends_the_worker_at_once(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    worker = await start_worker()
    client = await client_of(await open_runtime(), 1)
    call = await client.round_robin({"count": 10_000, "pause_s": 0.01}, annotated=False)
    await anext(call)
    worker.terminate()
    async with asyncio.timeout(30):
        while client.instance_ids():
            await anext(call)
        worker.terminate()
        with pytest.raises(ConnectionLost) as caught:
            await exhaust(call)
        assert caught.value.retryable
        assert await worker.wait() == -signal.SIGTERM


async def test_request_longer_than_the_shutdown_ends_with_it(
    open_runtime: OpenRuntime, start_worker: StartWorker
) -> None:
    """Its caller gets an error, and the process ends with 0 at the deadline."""
    worker = await start_worker(DYN_GRACEFUL_SHUTDOWN_S="1")
    client = await client_of(await open_runtime(), 1)
    call = await client.round_robin({"count": 2, "pause_s": 0.001, "then_hang": True}, annotated=False)
    assert await anext(call) == [worker.pid, 0]
    worker.send_signal(signal.SIGTERM)
    with pytest.raises(Draining, match="before the request was finished"):
        await exhaust(call)
    assert await asyncio.wait_for(worker.wait(), 20) == 0
