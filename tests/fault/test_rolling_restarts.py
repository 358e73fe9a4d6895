"""Restarts of workers and frontends one after another, under load: no request fails."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.frontend_programs import (
    WITHIN_S,
    Load,
    Program,
    Programs,
    until_instances,
    until_served_everywhere,
    until_serving,
)

WORKER = ("--speedup-ratio", "2")


@pytest.fixture
def programs(tmp_path: Path, dynamo_redis_url: str, dynamo_redis_prefix: str) -> Iterator[Programs]:
    started = Programs(tmp_path, dynamo_redis_url, dynamo_redis_prefix)
    yield started
    started.kill()


async def test_workers_are_replaced_without_loss(programs: Programs, tmp_path: Path) -> None:
    """No request that is made after a worker's leaving was seen reaches that worker, be it to be refused.

    Long answers keep each worker at its drain meanwhile.
    """
    workers: list[tuple[Program, Path]] = []

    def start_worker() -> None:
        notes = tmp_path / f"requests-{len(workers)}"
        workers.append((programs.worker(notes, *WORKER), notes))

    start_worker()
    start_worker()
    url = await programs.frontend().url()
    await until_instances(url, 2)
    load, slow = Load(url), Load(url, max_tokens=600)
    async with load.running(), httpx.AsyncClient(timeout=WITHIN_S) as http:
        for replaced in range(3):
            await load.until_answered(10)
            start_worker()
            await until_instances(url, 3)
            old, notes = workers[replaced]
            long = [f"long-{replaced}-{number}" for number in range(6)]
            answers = [asyncio.create_task(slow.chat(http, request_id)) for request_id in long]
            async with asyncio.timeout(WITHIN_S):
                while set(long).isdisjoint(notes.read_text().split()):
                    await asyncio.sleep(0.01)
            old.send(signal.SIGTERM)
            await until_instances(url, 2)
            late = [f"late-{replaced}-{number}" for number in range(24)]
            await asyncio.gather(*(load.chat(http, request_id) for request_id in late))
            await asyncio.gather(*answers)
            assert await old.ended() == 0
            assert set(late).isdisjoint(notes.read_text().split())
    assert load.failures == slow.failures == []


async def test_frontends_are_replaced_without_loss(programs: Programs, tmp_path: Path) -> None:
    """Each process gets SIGTERM, then both at the same time, then the command gets SIGHUP."""
    programs.worker(tmp_path / "requests", *WORKER)
    frontend = programs.frontend("--frontend-processes", "2")
    url = await frontend.url()
    pids = sorted(await until_serving(url, 2))
    await until_served_everywhere(url)
    load = Load(url)
    async with load.running(kept_count=6, fresh_count=4):
        for pid in pids:
            await load.until_answered(20)
            os.kill(pid, signal.SIGTERM)
            await until_serving(url, 2, without=[pid])
        await load.until_answered(20)
        second = sorted(await until_serving(url, 2, without=pids))
        for pid in second:
            os.kill(pid, signal.SIGTERM)
        third = sorted(await until_serving(url, 2, without=[*pids, *second]))
        await load.until_answered(20)
        frontend.send(signal.SIGHUP)
        await until_serving(url, 2, without=[*pids, *second, *third])
        await load.until_answered(20)
    assert load.failures == []
    frontend.send(signal.SIGTERM)
    assert await frontend.ended() == 0
