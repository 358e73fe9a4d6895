"""A whole deployment under faults: a frontend and workers as processes, and chats that must not fail."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from dynamo_redis.child import ChildProcess
from dynamo_redis.store.server import EmbeddedServer
from faults.chats import ChatFailed, chat

READY_S = 60.0
BACK_S = 60.0
WORKERS = 2


class Deployment:
    """One frontend and its workers on a Redis that the test may kill."""

    def __init__(self, server: EmbeddedServer, directory: Path) -> None:
        self.server = server
        self.http = httpx.AsyncClient(timeout=30)
        self.workers: list[ChildProcess] = []
        self._processes: list[ChildProcess] = []
        self._directory = directory
        self._logs: list[Path] = []

    async def start(self) -> None:
        frontend, logs = await self._program("frontend", "--http-host", "127.0.0.1", "--http-port", "0")
        self._processes.append(frontend)
        for _ in range(WORKERS):
            await self.add_worker()
        self.http.base_url = await self._first(logs, r"^ready (http://\S+)")
        await self.until_instances(WORKERS, READY_S)

    async def add_worker(self) -> None:
        worker, _ = await self._program("worker", "mock", "--decode-step", "10ms")
        self.workers.append(worker)
        self._processes.append(worker)

    async def _program(self, *arguments: str) -> tuple[ChildProcess, Path]:
        out = self._directory / f"{len(self._logs)}.log"
        self._logs.append(out)
        options = ("--redis-url", self.server.url, "--lease-ttl", "5s")
        with out.open("wb") as file:
            child = ChildProcess.start(
                [sys.executable, "-m", "dynamo_redis", *arguments, *options], stdout=file, stderr=file
            )
        return child, out

    async def _first(self, logs: Path, pattern: str) -> str:
        async with asyncio.timeout(READY_S):
            while (found := re.search(pattern, logs.read_text(), re.MULTILINE)) is None:
                await asyncio.sleep(0.02)
        return found[1]

    async def instances(self) -> list[int]:
        """Return the instances that the frontend lists."""
        answer = await self.http.get("/health")
        return [instance["instance_id"] for instance in answer.json()["instances"]]

    async def until_instances(self, count: int, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while len(await self.instances()) != count:
                await asyncio.sleep(0.05)

    def chat(self, max_tokens: int = 50) -> AsyncIterator[str]:
        """Yield the pieces of a streamed answer. An error event or status fails the test."""
        return chat(self.http, f"Hello at {time.monotonic()}!", max_tokens)

    async def aclose(self) -> None:
        await self.http.aclose()
        await asyncio.gather(*(child.stop(5) for child in self._processes))

    def log_tail(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in self._logs)


@pytest.fixture
async def deployment(own_redis_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Deployment]:
    deployment = Deployment(own_redis_server, tmp_path)
    try:
        await deployment.start()
        yield deployment
    finally:
        await deployment.aclose()


class Load:
    """Chats one after the other, several at a time, until stopped."""

    def __init__(self, deployment: Deployment, concurrency: int = 4) -> None:
        self.answered = 0
        self._stop = False
        self._tasks = [asyncio.create_task(self._run(deployment)) for _ in range(concurrency)]

    async def _run(self, deployment: Deployment) -> None:
        while not self._stop:
            assert len([piece async for piece in deployment.chat(20)]) > 5
            self.answered += 1

    async def stop(self) -> int:
        """Let the last chats finish; return their number. Raises the error of a chat that failed."""
        self._stop = True
        await asyncio.gather(*self._tasks)
        return self.answered


@pytest.mark.parametrize("keep_data", [True, False], ids=["with-its-data", "empty"])
async def test_chats_go_on_while_redis_is_killed_and_restarted(
    deployment: Deployment, keep_data: bool
) -> None:
    known = sorted(await deployment.instances())
    load = Load(deployment)
    long = asyncio.create_task(_count(deployment.chat(400)))
    await asyncio.sleep(0.5)
    await deployment.server.kill()
    await asyncio.sleep(1.5)
    before = load.answered
    async with asyncio.timeout(READY_S):  # chats are answered while Redis is down
        while load.answered <= before:
            await asyncio.sleep(0.02)
    await deployment.server.restart(keep_data=keep_data)
    await deployment.until_instances(WORKERS, BACK_S)
    async with asyncio.timeout(BACK_S):
        while await _registered(deployment) != known:
            await asyncio.sleep(0.05)
    assert await load.stop() > 10
    assert await long > 100


async def test_killed_worker_fails_its_chats_at_once_and_is_avoided(deployment: Deployment) -> None:
    answers = [deployment.chat(300) for _ in range(WORKERS)]
    for answer in answers:
        await anext(answer)
    ends = [asyncio.create_task(_end(answer)) for answer in answers]
    killed_at = time.monotonic()
    deployment.workers[0].kill()
    for _ in range(6):
        assert len([piece async for piece in deployment.chat(5)]) > 1
    (told_at, error), (_, none) = sorted(await asyncio.gather(*ends), key=lambda end: end[1] is None)
    assert isinstance(error, ChatFailed)
    assert told_at - killed_at < 8
    assert none is None


async def test_frozen_worker_is_avoided_within_two_seconds(deployment: Deployment) -> None:
    """A frozen worker behaves as a host without power: it refuses and answers nothing."""
    import signal

    deployment.workers[0].send_signal(signal.SIGSTOP)
    try:
        slowest = 0.0
        for _ in range(6):
            started = time.monotonic()
            async with asyncio.timeout(30):
                assert len([piece async for piece in deployment.chat(5)]) > 1
            slowest = max(slowest, time.monotonic() - started)
        assert slowest < 8
    finally:
        deployment.workers[0].send_signal(signal.SIGCONT)


async def test_workers_come_and_go_while_chats_run(deployment: Deployment) -> None:
    load = Load(deployment)
    for _ in range(2):
        await deployment.add_worker()
        await deployment.until_instances(WORKERS + 1, READY_S)
        await deployment.workers.pop(0).stop(10)
        await deployment.until_instances(WORKERS, BACK_S)
    assert await load.stop() > 10


async def _end(pieces: AsyncIterator[str]) -> tuple[float, ChatFailed | None]:
    """Return when an answer ended, and its error."""
    try:
        async for _ in pieces:
            pass
    except ChatFailed as exc:
        return time.monotonic(), exc
    return time.monotonic(), None


async def _count(pieces: AsyncIterator[str]) -> int:
    return len([piece async for piece in pieces])


async def _registered(deployment: Deployment) -> list[int]:
    """Return the instances in the registry, regardless of the frontend's view."""
    from dynamo_redis.config import StoreSettings
    from dynamo_redis.store.registry.redis_registry import RedisRegistry

    registry = RedisRegistry(StoreSettings.load(redis_url=deployment.server.url))
    await registry.start()
    try:
        snapshot = await registry.get_prefix("v1/instances/dynamo/backend/generate/")
    finally:
        await registry.aclose()
    return sorted(json.loads(record.value)["instance_id"] for record in snapshot.records)
