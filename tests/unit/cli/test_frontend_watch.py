"""The watch over the frontend processes, by unix sockets that answer or do not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dynamo_redis.cli import frontend_watch
from dynamo_redis.frontend.http import siblings


class Process:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.silent_since: float | None = None
        self.killed = asyncio.Event()

    def kill(self) -> None:
        self.killed.set()


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take a question and never answer it."""
    await reader.read()
    writer.close()


async def test_process_that_hangs_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that answers stays, be its answer a refusal; one without a socket is no matter of the watch."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    monkeypatch.setattr(frontend_watch, "LOOK_S", 0.01)
    monkeypatch.setattr(siblings, "ANSWER_S", 1.0)
    hung, absent, alive = processes = [Process(1), Process(2), Process(3)]
    async with (
        await asyncio.start_unix_server(hang, tmp_path / "1"),
        await asyncio.start_unix_server(refuse, tmp_path / "3"),
    ):
        watching = asyncio.create_task(frontend_watch.watch(lambda: processes, tmp_path, 0.05))
        async with asyncio.timeout(30):
            await hung.killed.wait()
        watching.cancel()
        await asyncio.wait([watching])
    assert not alive.killed.is_set()
    assert not absent.killed.is_set()
    assert "frontend process 1 does not answer" in caplog.text


async def test_watch_without_a_limit_kills_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_watch, "LOOK_S", 0.001)
    monkeypatch.setattr(siblings, "ANSWER_S", 0.01)
    process = Process(1)
    looks = 0

    def serving() -> list[Process]:
        nonlocal looks
        looks += 1
        return [process]

    async with await asyncio.start_unix_server(hang, tmp_path / "1"):
        watching = asyncio.create_task(frontend_watch.watch(serving, tmp_path, 0.0))
        async with asyncio.timeout(30):
            while looks < 5:
                await asyncio.sleep(0.001)
        watching.cancel()
        await asyncio.wait([watching])
    assert process.silent_since is not None
    assert not process.killed.is_set()
