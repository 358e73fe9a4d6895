"""The processes of a replay, as the one that leads them sees them."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any, Final, Self

import psutil

from benchmarks.harness.processes import REPOSITORY

_READY_S: Final = 60.0
_END_S: Final = 20.0


class Child:
    """A process that is led by lines (`replay.lines`). Ends with this one, whatever becomes of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._usage = psutil.Process(process.pid)

    @classmethod
    async def start(cls, module: str, *arguments: str) -> Self:
        """Run `benchmarks.MODULE`; it is ready when it has answered."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"benchmarks.{module}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
            start_new_session=True,  # Ctrl-C reaches this process alone, which lets it end in order
        )
        return cls(process)

    def say(self, *words: object) -> None:
        """Give a command. Without effect on one that has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")

    async def answer(self, timeout_s: float | None = _READY_S) -> dict[str, Any]:
        """Its next answer. Raises RuntimeError if it has ended, TimeoutError."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the replay ended: {await self._process.wait()}")
        fields: dict[str, Any] = json.loads(line)
        return fields

    async def answer_to(self, *words: object) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.say(*words)
        return await self.answer()

    def cpu_s(self) -> float:
        """User and system time so far; 0 if it has ended."""
        with suppress(psutil.Error):
            times = self._usage.cpu_times()
            return times.user + times.system
        return 0.0

    def resident_bytes(self) -> int:
        """Resident memory; 0 if it has ended."""
        with suppress(psutil.Error):
            return int(self._usage.memory_info().rss)
        return 0

    async def kill(self) -> None:
        """kill -9."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def aclose(self) -> None:
        """Let it end; kill it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await self._process.wait()
        except TimeoutError:
            await self.kill()
