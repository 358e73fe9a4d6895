"""The child processes of a replay, as their leader sees them."""

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
    """A process that is led by lines (`replay.lines`). It ends with this process, however that ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._usage = psutil.Process(process.pid)

    @classmethod
    async def start(cls, module: str, *arguments: str) -> Self:
        """Run `benchmarks.MODULE`, and return it when its first answer shows that it is ready."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"benchmarks.{module}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the child in order
        )
        return cls(process)

    def send(self, *words: object) -> None:
        """Send a command. Has no effect on a process that has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")

    async def answer(self, timeout_s: float | None = _READY_S) -> dict[str, Any]:
        """Wait for the next answer and return it. Raises RuntimeError if the process has ended,
        TimeoutError."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the replay ended: {await self._process.wait()}")
        fields: dict[str, Any] = json.loads(line)
        return fields

    async def answer_to(self, *words: object) -> dict[str, Any]:
        """Send a command, wait for its answer, and return that."""
        self.send(*words)
        return await self.answer()

    def cpu_s(self) -> float:
        """Return its user and system time in seconds; 0 if it has ended."""
        with suppress(psutil.Error):
            times = self._usage.cpu_times()
            return times.user + times.system
        return 0.0

    def resident_bytes(self) -> int:
        """Return its resident memory in bytes; 0 if it has ended."""
        with suppress(psutil.Error):
            return int(self._usage.memory_info().rss)
        return 0

    async def kill(self) -> None:
        """Kill it (kill -9)."""
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
